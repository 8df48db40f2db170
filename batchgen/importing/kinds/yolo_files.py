"""Reads data.yaml of a YOLO dataset: names of classes, and the images of each split."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchgen.errors import InputError
from batchgen.importing.listing import Listing, is_image_name, stem_of
from batchgen.importing.rows import Place, Reject
from batchgen.importing.splits import split_in
from batchgen.spec.splits import TEST, TRAIN, VALIDATION
from batchgen.spec.yaml_text import parse_yaml

_SPLITS = {"train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "test": TEST}


@dataclass(frozen=True)
class Description:
    """What data.yaml says.

    Attributes:
        names: the names of the classes, by number.
        images: name of each image -> its split.
        keypoints: number of keypoints and of values of each (2 or 3); None for boxes and polygons.
    """

    names: tuple[str, ...]
    images: Mapping[str, str | None]
    keypoints: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def describe(listing: Listing) -> Description:
    """Read data.yaml, or classes.txt.

    Raises:
        InputError: there is none, or several, or it is not of YOLO.
    """
    found = _with_names(listing)
    if len(found) > 1:
        raise InputError(
            f"source {listing.source}: {' and '.join(found)} both have `names`; keep one of them"
        )
    if found:
        file, tree = next(iter(found.items()))
        notes, rejects = list[str](), list[Reject]()
        names = _names(tree["names"], file)
        images = dict(_of_splits(listing, file, tree, notes, rejects)) or _all(listing)
        left = sum(is_image_name(name) for name in listing.files) - len(images)
        if left:
            notes.append(f"{left} images that {file} does not name were left out")
        rejects += _without_image(listing)
        return Description(names, images, _shape(tree.get("kpt_shape"), file), notes, rejects)
    file = next((name for name in listing.files if name.endswith("classes.txt")), "")
    if not file:
        raise InputError(f"source {listing.source}: no data.yaml with `names`, and no classes.txt")
    lines = listing.read(file).decode("utf-8", "replace").splitlines()
    names, images = _names([one.strip() for one in lines if one.strip()], file), _all(listing)
    return Description(names, images, rejects=list(_without_image(listing)))


def _with_names(listing: Listing) -> dict[str, dict[str, Any]]:
    """YAML files that list names of classes."""
    found = {}
    for name in listing.named(".yaml", ".yml"):
        tree = parse_yaml(listing.read(name), name)
        if isinstance(tree, dict) and "names" in tree:
            found[name] = tree
    return found


def _names(given: Any, file: str) -> tuple[str, ...]:
    if isinstance(given, dict):
        numbers = [str(number) for number in range(len(given))]
        if sorted(given) != sorted(numbers):
            raise InputError(f"{file}: `names` needs the numbers 0, 1, 2 and so on, or a list")
        given = [given[number] for number in numbers]
    if not isinstance(given, list) or not given:
        raise InputError(f"{file}: `names` needs a list of names, or a mapping of numbers to names")
    names = [str(one) for one in given]
    for name in names:
        if not 0 < len(name) <= 200 or names.count(name) > 1:
            raise InputError(f"{file}: `names` has {name[:80]!r}; each needs to be there once")
    return tuple(names)


def _shape(given: Any, file: str) -> tuple[int, int] | None:
    if given is None:
        return None
    fits = (
        isinstance(given, list) and len(given) == 2 and all(isinstance(one, int) for one in given)
    )
    if not fits or not 1 <= given[0] <= 1000 or given[1] not in (2, 3):
        raise InputError(f"{file}: kpt_shape is {given!r}; allowed: [number of points, 2 or 3]")
    return given[0], given[1]


def _of_splits(
    listing: Listing, file: str, tree: Mapping[str, Any], notes: list[str], rejects: list[Reject]
) -> Iterator[tuple[str, str | None]]:
    """The images of each split that the YAML names: folders, or text files that list images."""
    for word, split in _SPLITS.items():
        given = tree.get(word)
        for one in given if isinstance(given, list) else [given]:
            if not isinstance(one, str) or not one:
                continue
            place = _place(listing, file, str(tree.get("path") or ""), one)
            if place is None:
                notes.append(f"{file}: {word}: {one} is not in the source, and was left out")
            elif place in listing.files:
                yield from _listed(listing, file, place, split, rejects)
            else:
                start = f"{place}/" if place else ""
                for name in listing.files:
                    if name.startswith(start) and is_image_name(name):
                        yield name, split


def _place(listing: Listing, file: str, path: str, one: str) -> str | None:
    """The folder or file that the YAML means, in the source; None if it is not there."""
    folder = posixpath.dirname(file)
    root = listing.root.rstrip("/") + "/"
    inner = (path + "/").removeprefix(root).rstrip("/") if path.startswith("/") else path
    bare = one.removeprefix(root).replace("\\", "/")
    while bare.startswith(("../", "./", "/")):
        bare = bare.partition("/")[2]
    for start in (posixpath.join(folder, inner), folder, ""):
        for last in (one, bare):
            found = posixpath.normpath(posixpath.join(start, last))
            found = "" if found == "." else found
            if found in listing.files or _is_folder(found, listing):
                return found
    return None


def _is_folder(name: str, listing: Listing) -> bool:
    return any(one.startswith(f"{name}/" if name else "") for one in listing.files)


def _listed(
    listing: Listing, file: str, place: str, split: str, rejects: list[Reject]
) -> Iterator[tuple[str, str | None]]:
    """The images that a text file lists."""
    lines = listing.read(place).decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        found = _place(listing, file, posixpath.dirname(place), name) if name else None
        if found in listing.files and found is not None and is_image_name(found):
            yield found, split
        elif name:
            message = f"{place} line {number}: image {name!r} is not in the source"
            rejects.append(Reject(Place(place, f"line {number}"), "missing-image", message))


def _without_image(listing: Listing) -> Iterator[Reject]:
    """Label files that belong to no image of the source."""
    used = {label_name(name, listing) for name in listing.files if is_image_name(name)}
    for name in listing.named(".txt"):
        if "labels" in name.split("/")[:-1] and name not in used:
            message = f"{name}: there is no image with these labels"
            yield Reject(Place(name), "missing-image", message)


def _all(listing: Listing) -> dict[str, str | None]:
    """All images, with the split in the names of their folders."""
    images = [name for name in listing.files if is_image_name(name)]
    return {name: split_in(posixpath.dirname(name)) for name in images}


def label_name(image: str, listing: Listing) -> str | None:
    """The label file of an image: its path with the last ``images`` replaced by ``labels``.

    None if it has none, which means that the image has no objects.
    """
    folders = image.split("/")
    for at in range(len(folders) - 2, -1, -1):
        if folders[at] == "images":
            folders[at] = "labels"
            break
    name = f"{stem_of('/'.join(folders))}.txt"
    if name in listing.files:
        return name
    near = f"{stem_of(image)}.txt"
    return near if near in listing.files else None
