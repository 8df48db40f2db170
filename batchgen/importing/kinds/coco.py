"""COCO: JSON files of images, annotations and categories, and folders of images.

Format: https://cocodataset.org/#format-data. Instances, keypoints and captions of the same images
(``instances_val2017.json``, ``captions_val2017.json``) become one row for each image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, shown
from batchgen.importing.inference import INT64, Kinds
from batchgen.importing.kinds.coco_files import MERGED, Annotated, load_group
from batchgen.importing.listing import Listing, file_keys, stem_of
from batchgen.importing.objects import FIELDS, ObjectFields, fields_of
from batchgen.importing.pictures import Picture, Pictures, Size
from batchgen.importing.records import OBJECTS, SPLIT
from batchgen.importing.rows import (
    KEY,
    Columns,
    Dataset,
    Item,
    Kind,
    Later,
    Options,
    Place,
    Refused,
    refuse,
)
from batchgen.importing.splits import split_in
from batchgen.labels.columns import IMAGE

_PANOPTIC = re.compile(r"(^|/)panoptic_[^/]*$")
_IMAGE_FIELDS = ("id", "file_name", "width", "height")
_NOT_OBJECTS = ("image_id", "category_id", "caption", "segmentation")
_PLAIN = ("bool", "int", "float", "str")


@dataclass(frozen=True)
class Group:
    """JSON files about the same images: their names, the split, and folders of the images."""

    name: str
    files: tuple[str, ...]
    split: str | None
    folders: tuple[str, ...]


@dataclass
class _Survey:
    """What the first reading found."""

    known: set[str] = field(default_factory=set)
    others: dict[str, Kinds] = field(default_factory=dict)
    image_fields: dict[str, Kinds] = field(default_factory=dict)
    categories: dict[int, dict[str, Any]] = field(default_factory=dict)
    names: list[tuple[str, str]] = field(default_factory=list)  # group and file of each image
    captions: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def fits(listing: Listing) -> bool:
    """Whether it is one JSON file, or has JSON files where COCO has them."""
    found = listing.named(".json")
    if len(listing.files) == 1:
        return bool(found)
    return any(
        re.search(r"(^|/)annotations/[^/]+$|coco\.json$|(^|/)instances[^/]*$", name.lower())
        for name in found
    )


def read(listing: Listing, options: Options) -> Dataset:
    """Read all JSON files of the source; each is read whole, images one by one."""
    groups = _groups(listing)
    notes = [
        f"{name} was left out: panoptic annotations are not imported"
        for name in listing.named(".json")
        if _PANOPTIC.search(name)
    ]
    survey, last = _Survey(), None
    for group in groups:
        last = load_group(listing, group.name, group.files)
        _look(survey, group, last)
    if not survey.names:
        raise InputError(f"source {listing.source}: its JSON files list no images")
    pictures = Pictures(listing, options.images, options.image_root).prepared()
    reader = _reader(survey, pictures)
    items = reader.items(listing, groups, last if len(groups) == 1 else None)
    for name, kinds in (("annotations", survey.others), ("images", survey.image_fields)):
        left = sorted(one for one, kind in kinds.items() if kind.kind not in _PLAIN)
        if left:
            notes.append(f"fields of {name} that were left out: {', '.join(left)}")
    return Dataset(reader.columns(), items, total=len(survey.names), notes=notes)


def _groups(listing: Listing) -> list[Group]:
    """The JSON files that have images, those of the same images together."""
    found: dict[str, list[str]] = {}
    for name in listing.named(".json"):
        if not _PANOPTIC.search(name):
            folder, slash, last = stem_of(name).rpartition("/")
            found.setdefault(folder + slash + MERGED.sub("", last), []).append(name)
    if not found:
        raise InputError(f"source {listing.source}: no JSON file; COCO has annotations/*.json")
    groups = []
    for name, files in found.items():
        folder, _, last = name.rpartition("/")
        outer = folder.rpartition("/")[0]
        split = split_in(name)
        inner = [last, split or "", *_words_of(split)]
        folders = ["", folder, outer, "images", *inner, *(f"images/{one}" for one in inner)]
        if outer:
            folders += [f"{outer}/{one}" for one in ("images", *inner)]
        groups.append(Group(name, tuple(files), split, tuple(dict.fromkeys(folders))))
    return groups


def _words_of(split: str | None) -> tuple[str, ...]:
    return {"validation": ("val", "valid"), "train": (), "test": ()}.get(split or "", ())


def _look(survey: _Survey, group: Group, found: Annotated) -> None:
    """Take a group into account.

    Raises:
        InputError: a category whose id or name another one has.
    """
    for number, category in found.categories.items():
        known = survey.categories.setdefault(number, category)
        if known["name"] != category["name"]:
            raise InputError(
                f"{', '.join(group.files)}: category {number} is {category['name']!r}, and "
                f"{known['name']!r} in another file; all files of a source need the same categories"
            )
    for image in found.images.values():
        survey.names.append((group.name, image["file_name"]))
        for name, value in image.items():
            if name not in _IMAGE_FIELDS:
                survey.image_fields.setdefault(name, Kinds()).see(value)
    for several in found.annotations.values():
        for one in several:
            segmentation = one.get("segmentation")
            if segmentation:
                survey.known.add("rle" if isinstance(segmentation, Mapping) else "segmentation")
            for name, value in one.items():
                if name in FIELDS:
                    survey.known.add(name)
                elif name not in _NOT_OBJECTS:
                    survey.others.setdefault(name, Kinds()).see(value)
    survey.captions = survey.captions or bool(found.captions)
    survey.more = survey.more or dict(found.more)


def _reader(survey: _Survey, pictures: Pictures) -> _Reader:
    names = [one["name"] for _, one in sorted(survey.categories.items())]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two categories are called {twice!r}; rename one in the JSON")
    others = {name: kind for name, kind in survey.others.items() if kind.kind in _PLAIN}
    fields = fields_of(survey.known, names, others) if survey.categories else None
    files = [file for _, file in survey.names]
    paths = (
        files if len(set(files)) == len(files) else [f"{one}/{two}" for one, two in survey.names]
    )
    keys = file_keys(dict.fromkeys(paths))
    by_image = {pair: keys[path] for pair, path in zip(survey.names, paths, strict=True)}
    plain = {name: one for name, one in survey.image_fields.items() if one.kind in _PLAIN}
    renamed = {name: f"coco_{name}" if name in _OWN else name for name in plain}
    return _Reader(survey, pictures, fields, by_image, plain, renamed)


_OWN = (KEY, "image", "prompt", "captions", "label", OBJECTS, SPLIT, "image_id", "label_mask")


@dataclass(frozen=True)
class _Reader:
    """Makes rows of the images of JSON files."""

    survey: _Survey
    pictures: Pictures
    fields: ObjectFields | None
    keys: Mapping[tuple[str, str], str]
    plain: Mapping[str, Kinds]
    renamed: Mapping[str, str]

    @cached_property
    def numbers(self) -> dict[int, int]:
        """The number of each category by its id."""
        return {number: place for place, number in enumerate(sorted(self.survey.categories))}

    def columns(self) -> Columns:
        kinds: dict[str, pa.DataType] = {"image": IMAGE}
        parts = {KEY: KEY, "image": "image"}
        names = {}
        if self.survey.captions:
            kinds |= {"prompt": pa.string(), "captions": pa.list_(pa.string())}
            parts["prompt"] = "prompt"
        if self.fields is not None:
            kinds[OBJECTS] = self.fields.type
            parts[OBJECTS], names[OBJECTS] = OBJECTS, self.fields.names or ()
        kinds[SPLIT] = pa.string()
        kinds |= {"image_width": pa.int32(), "image_height": pa.int32()}
        if self.fields is not None:
            parts |= {"image_width": "image_width", "image_height": "image_height"}
        kinds |= {"file_name": pa.string(), "image_id": pa.int64()}
        kinds |= {self.renamed[name]: one.type() for name, one in self.plain.items()}
        categories = tuple(one for _, one in sorted(self.survey.categories.items()))
        more = {"source": self.survey.more} if self.survey.more else {}
        return Columns(pa.schema(list(kinds.items())), names, parts, categories, more)

    def items(
        self, listing: Listing, groups: list[Group], loaded: Annotated | None
    ) -> Iterator[Item]:
        for group in groups:
            found = loaded or load_group(listing, group.name, group.files)
            yield from found.rejects
            for number, image in found.images.items():
                place = Place(group.files[0], f"image {number}")
                make = partial(self.values, group, found, image)
                yield Later(self.keys[group.name, image["file_name"]], place, make)

    def values(self, group: Group, found: Annotated, image: Mapping[str, Any]) -> dict[str, Any]:
        """The values of one image's row.

        Raises:
            Refused: its file, its size or one of its annotations.
        """
        number = image["id"]
        where = f"{group.files[0]} image {number}"
        if number in found.faults:
            raise found.faults[number]
        picture = self.pictures.named(image["file_name"], "image", group.folders)
        size = _size_of(image, picture, where)
        values: dict[str, Any] = {"image": picture.value, "image_id": number, SPLIT: group.split}
        values["file_name"] = image["file_name"]
        if size is not None:
            values |= {"image_width": size[0], "image_height": size[1]}
        captions = found.captions.get(number, [])
        if captions:
            values |= {"prompt": captions[0], "captions": captions}
        if self.fields is not None:
            if size is None:
                allowed = "width and height in the JSON, or --images bytes"
                refuse("bad-objects", f"{where}: its size is not known", allowed)
            annotations = found.annotations.get(number, [])
            objects = [self._object(one, size, where) for one in annotations]
            values[OBJECTS] = self.fields.value(objects, size, where)
        for name, kind in self.plain.items():
            try:
                values[self.renamed[name]] = kind.fits(image.get(name), f"{where}, field {name!r}")
            except ValueError as error:
                raise Refused("bad-value", str(error)) from error
        return values

    def _object(self, one: Mapping[str, Any], size: Size, where: str) -> dict[str, Any]:
        """An annotation as an object."""
        where = f"{where}, annotation {one.get('id')}"
        numbers, category = self.numbers, one.get("category_id")
        if isinstance(category, bool) or not isinstance(category, int) or category not in numbers:
            known = ", ".join(str(number) for number in list(numbers)[:5])
            refuse("unknown-category", f"{where}: category_id {shown(category)}", f"{known}, ...")
        made = {name: one[name] for name in FIELDS if name in one and name != "segmentation"}
        made["category"] = numbers[category]
        segmentation = one.get("segmentation")
        if isinstance(segmentation, Mapping):
            made["rle"] = segmentation
        elif segmentation:
            made["segmentation"] = segmentation
        _check_numbers(made, where)
        for name, kind in self.survey.others.items():
            if kind.kind in _PLAIN and name in one:
                try:
                    made[name] = kind.fits(one[name], f"{where}, field {name!r}")
                except ValueError as error:
                    raise Refused("bad-objects", str(error)) from error
        return made


def _check_numbers(made: Mapping[str, Any], where: str) -> None:
    """Check the plain numbers of an annotation, which other checks do not cover."""
    allowed = {"id": range(INT64.start, INT64.stop), "iscrowd": (0, 1)}
    for name, values in allowed.items():
        given = made.get(name)
        if given is not None and (not isinstance(given, int) or given not in values):
            words = "0 or 1" if name == "iscrowd" else "a whole number"
            refuse("bad-objects", f"{where}: {name} {shown(given)}", words)


def _size_of(image: Mapping[str, Any], picture: Picture, where: str) -> Size | None:
    """The size that the annotations are about.

    Raises:
        Refused: that of the JSON is not that of the file.
    """
    told = image.get("width"), image.get("height")
    if told == (None, None):
        return picture.size
    if not all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in told):
        refuse("bad-objects", f"{where}: width {told[0]!r}, height {told[1]!r}", "pixels above 0")
    size = (told[0], told[1])
    if picture.size is not None and picture.size != size:
        turned = " before its EXIF orientation is applied" if picture.stored == size else ""
        refuse(
            "bad-objects",
            f"{where}: {size[0]} x {size[1]} pixels in the JSON{turned}, but one sees "
            f"{picture.size[0]} x {picture.size[1]} in the file",
            "annotations of the image as one sees it",
        )
    return size  # type: ignore[return-value]


KIND = Kind("coco", "COCO: annotations/*.json and images, or one JSON", fits, read)
