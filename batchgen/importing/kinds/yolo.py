"""YOLO: data.yaml with the names of the classes, images, and a text file of labels for each.

Format: https://docs.ultralytics.com/datasets: a line is ``class x y width height``, or ``class``
and the points of a polygon, as fractions of the image; with ``kpt_shape`` also keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.importing.kinds.yolo_files import Description, describe, label_name
from batchgen.importing.listing import Listing, file_keys
from batchgen.importing.objects import ObjectFields, fields_of
from batchgen.importing.pictures import Pictures, Size
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
from batchgen.labels.columns import IMAGE

_VISIBLE = 2.0


def fits(listing: Listing) -> bool:
    """Whether there is a data.yaml, and a folder of labels."""
    has_names = any(
        name.lower().endswith((".yaml", ".yml", "classes.txt")) for name in listing.files
    )
    return has_names and any("labels" in name.split("/")[:-1] for name in listing.files)


def read(listing: Listing, options: Options) -> Dataset:
    """Read all images that data.yaml names, with their labels."""
    described = describe(listing)
    if not described.images:
        raise InputError(f"source {listing.source}: data.yaml names no images that are there")
    points = described.keypoints is not None
    known = {"segmentation"} if not points and _has_polygons(listing, described) else set()
    known |= {"keypoints", "num_keypoints"} if points else set()
    fields = fields_of(known, described.names)
    pictures = Pictures(listing, options.images, options.image_root)
    schema = pa.schema(
        [
            ("image", IMAGE),
            (OBJECTS, fields.type),
            (SPLIT, pa.string()),
            ("image_width", pa.int32()),
            ("image_height", pa.int32()),
            ("file_name", pa.string()),
        ]
    )
    parts = {KEY: KEY, "image": "image", OBJECTS: OBJECTS}
    parts |= {"image_width": "image_width", "image_height": "image_height"}
    categories = tuple({"name": name} for name in described.names)
    columns = Columns(schema, {OBJECTS: described.names}, parts, categories)
    reader = _Reader(listing, described, fields, pictures)
    notes = list(described.notes)
    return Dataset(columns, reader.items(), unique=True, total=len(described.images), notes=notes)


def _has_polygons(listing: Listing, described: Description) -> bool:
    """Whether any line is a polygon; reads the labels until one is."""
    for image in described.images:
        name = label_name(image, listing)
        if name is not None:
            try:
                text = _text(listing, name)
            except Refused:
                continue
            if any(len(line.split()) > 6 for line in text.splitlines()):
                return True
    return False


@dataclass(frozen=True)
class _Reader:
    """Makes rows of images and their label files."""

    listing: Listing
    described: Description
    fields: ObjectFields
    pictures: Pictures

    def items(self) -> Iterator[Item]:
        yield from self.described.rejects
        names = list(self.described.images)
        lasts = [name.rpartition("/")[2] for name in names]
        keys = file_keys(lasts if len(set(lasts)) == len(lasts) else names)
        for (name, split), key in zip(self.described.images.items(), keys.values(), strict=True):
            yield Later(key, Place(name), partial(self.values, name, split))

    def values(self, name: str, split: str | None) -> dict[str, Any]:
        """The values of one image's row."""
        labels = label_name(name, self.listing)
        text = _text(self.listing, labels) if labels is not None else ""
        picture = self.pictures.load(name, measure=True)
        size = picture.size or (1, 1)
        objects = [
            self._object(line.split(), size, f"{labels} line {number}")
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
        return {
            "image": picture.value,
            OBJECTS: self.fields.value(objects, size, labels or name),
            SPLIT: split,
            "image_width": size[0],
            "image_height": size[1],
            "file_name": name,
        }

    def _object(self, words: list[str], size: Size, where: str) -> Mapping[str, Any]:
        category = self._category(words[0], where)
        numbers = [_number(word, where) for word in words[1:]]
        shape = self.described.keypoints
        if shape is not None:
            count, each = shape
            if len(numbers) != 4 + count * each:
                wanted = f"1 + 4 + {count} x {each} (kpt_shape of data.yaml)"
                refuse("bad-line", f"{where}: {len(words)} values", wanted)
            keypoints = _keypoints(numbers[4:], each, size)
            seen = sum(one > 0 for one in keypoints[2::3])
            box = _box(numbers[:4], size)
            made = {"bbox": box, "category": category, "keypoints": keypoints}
            return {**made, "num_keypoints": seen}
        if len(numbers) == 4:
            return {"bbox": _box(numbers, size), "category": category}
        if len(numbers) < 6 or len(numbers) % 2:
            wanted = "5 (a box), or 1 and x, y of 3 points or more (a polygon)"
            refuse("bad-line", f"{where}: {len(words)} values", wanted)
        polygon = [one * size[at % 2] for at, one in enumerate(numbers)]
        xs, ys = polygon[::2], polygon[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        return {"bbox": box, "category": category, "segmentation": [polygon]}

    def _category(self, word: str, where: str) -> int:
        names = self.described.names
        number = int(word) if word.isdecimal() and len(word) < 10 else -1
        if not 0 <= number < len(names):
            refuse("unknown-category", f"{where}: class {word[:40]!r}", f"0 to {len(names) - 1}")
        return number


def _box(numbers: list[float], size: Size) -> list[float]:
    """Middle and size as fractions -> x, y, width, height in pixels."""
    x, y, width, height = numbers
    return [
        (x - width / 2) * size[0],
        (y - height / 2) * size[1],
        width * size[0],
        height * size[1],
    ]


def _keypoints(numbers: list[float], each: int, size: Size) -> list[float]:
    """Fractions -> x, y in pixels and visibility; (0, 0) without one is a point not labelled."""
    found: list[float] = []
    for at in range(0, len(numbers), each):
        x, y = numbers[at], numbers[at + 1]
        seen = numbers[at + 2] if each == 3 else (0.0 if x == y == 0 else _VISIBLE)
        found += [x * size[0], y * size[1], seen]
    return found


def _number(word: str, where: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        refuse("bad-line", f"{where}: the value {word[:40]!r}", "numbers")
    return number


def _text(listing: Listing, name: str) -> str:
    try:
        return listing.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not-utf8", f"{name}: {error}; allowed: UTF-8") from error


KIND = Kind("yolo", "YOLO: data.yaml, images/SPLIT and labels/SPLIT", fits, read)
