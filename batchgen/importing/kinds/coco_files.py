"""Reads the JSON files of COCO: images, annotations by image, captions and categories."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from batchgen.errors import InputError
from batchgen.importing.listing import LISTING_LIMIT_BYTES, Listing
from batchgen.importing.rows import Place, Refused, Reject

MERGED = re.compile(r"^(instances|captions|person_keypoints|keypoints|image_info)_")
_MOST_INFO = 64 << 10  # characters of `info` and `licenses` that are kept


@dataclass
class Annotated:
    """The content of JSON files about the same images.

    Attributes:
        images: id -> the image's entry.
        annotations: image id -> its annotations; those with the same id are merged.
        captions: image id -> its captions.
        categories: id -> the category's entry.
        faults: image id -> why its row is refused.
        rejects: entries that belong to no row.
    """

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    captions: dict[int, list[str]] = field(default_factory=dict)
    categories: dict[int, dict[str, Any]] = field(default_factory=dict)
    faults: dict[int, Refused] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    by_id: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)


def load_group(listing: Listing, name: str, files: tuple[str, ...]) -> Annotated:
    """Read the JSON files of a group.

    Raises:
        InputError: one is not JSON, or not of COCO.
    """
    found = Annotated()
    for file in files:
        tree = _tree(listing, file)
        _images(found, tree, file, first=file == files[0])
        _categories(found, tree, file)
        _annotations(found, tree, file)
        more = {key: tree[key] for key in ("info", "licenses") if tree.get(key)}
        if not found.more and len(json.dumps(more)) < _MOST_INFO:
            found.more = more
    found.by_id.clear()
    return found


def _tree(listing: Listing, file: str) -> dict[str, Any]:
    try:
        tree = json.loads(listing.read(file, LISTING_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    except Refused as error:
        raise InputError(str(error)) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
        raise InputError(f"{file} is not of COCO: it has no list `images`")
    for name in ("annotations", "categories"):
        if not isinstance(tree.get(name, []), list):
            raise InputError(f"{file} is not of COCO: `{name}` is not a list")
    return tree


def _images(found: Annotated, tree: Mapping[str, Any], file: str, first: bool) -> None:
    seen = set()
    for place, image in enumerate(tree["images"]):
        number = image.get("id") if isinstance(image, dict) else None
        name = image.get("file_name") if isinstance(image, dict) else None
        where = Place(file, f"image {number if _is_id(number) else f'at place {place}'}")
        if not _is_id(number) or not isinstance(name, str) or not name or not _is_text(name):
            message = f"{file} {where.at}: it needs a whole number `id` and a text `file_name`"
            found.rejects.append(Reject(where, "bad-json", message))
        elif number in seen:
            message = f"{file}: two images have the id {number}; allowed: ids that are unique"
            found.rejects.append(Reject(where, "duplicate-key", message))
            found.faults[number] = Refused("duplicate-key", message)
        else:
            seen.add(number)
            found.images.setdefault(number, image)


def _categories(found: Annotated, tree: Mapping[str, Any], file: str) -> None:
    for one in tree.get("categories") or ():
        number = one.get("id") if isinstance(one, dict) else None
        name = one.get("name") if isinstance(one, dict) else None
        if not _is_id(number) or not isinstance(name, str) or not 0 < len(name) <= 200:
            raise InputError(
                f"{file}: the category {str(one)[:80]} needs a whole number `id` and a `name` of "
                "1 to 200 characters"
            )
        kept = found.categories.setdefault(number, {"name": name, "id": number})
        if kept["name"] != name:
            raise InputError(f"{file}: category {number} is {kept['name']!r} and {name!r}")
        if isinstance(one.get("supercategory"), str):
            kept["supercategory"] = one["supercategory"]
        kept |= _points(one, file)


def _points(category: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Names and skeleton of a category's keypoints."""
    names, skeleton = category.get("keypoints") or [], category.get("skeleton") or []
    fits = isinstance(names, list) and all(isinstance(one, str) for one in names)
    pairs = isinstance(skeleton, list) and all(
        isinstance(one, list) and len(one) == 2 and all(_is_id(end) for end in one)
        for one in skeleton
    )
    if not fits or not pairs:
        raise InputError(
            f"{file}: category {category['id']} needs a list of names as `keypoints`, and a list "
            "of pairs of numbers as `skeleton`"
        )
    return ({"keypoints": names} if names else {}) | ({"skeleton": skeleton} if skeleton else {})


def _annotations(found: Annotated, tree: Mapping[str, Any], file: str) -> None:
    seen: dict[int, int] = {}
    for place, one in enumerate(tree.get("annotations") or ()):
        image = one.get("image_id") if isinstance(one, dict) else None
        number = one.get("id") if isinstance(one, dict) else None
        at = f"annotation {number if _is_id(number) else f'at place {place}'}"
        if not _is_id(image) or image not in found.images:
            message = f"{file} {at}: image_id {image!r} is not among `images`"
            found.rejects.append(Reject(Place(file, at), "unknown-image", message))
        elif "caption" in one:
            if isinstance(one["caption"], str) and _is_text(one["caption"]):
                found.captions.setdefault(image, []).append(one["caption"].strip())
            else:
                fault = Refused("bad-json", f"{file} {at}: a caption that is not text")
                found.faults.setdefault(image, fault)
        else:
            if _is_id(number) and number in seen:
                message = f"{file}: two annotations have the id {number}; allowed: unique ids"
                for other in (image, seen[number]):
                    found.faults.setdefault(other, Refused("bad-objects", message))
            elif _is_id(number):
                seen[number] = image
            _add(found, image, number, one)


def _add(found: Annotated, image: int, number: Any, one: dict[str, Any]) -> None:
    """Add an annotation; with those of other files (keypoints) under the same id it is merged."""
    known = found.by_id.get((image, number)) if _is_id(number) else None
    if known is not None:
        for name, value in one.items():
            known.setdefault(name, value)
        return
    found.annotations.setdefault(image, []).append(one)
    if _is_id(number):
        found.by_id[image, number] = one


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_text(text: str) -> bool:
    """Whether it can be stored: JSON may have half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
