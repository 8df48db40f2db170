"""The labelled objects of one image: read from a row and checked.

The fields are COCO's (Lin et al., 2014): boxes, categories, polygons, run-length masks, keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchgen.errors import RejectRow
from batchgen.images.geometry import Array, Box, Size
from batchgen.labels.rle import Polygon, Rle, decoded, drawn, read_rle

Category = int | str

TOLERANCE_PX, TOLERANCE = 2.0, 0.01  # how far a box may reach beyond its image: annotators round
KNOWN = ("id", "area", "iscrowd", "segmentation", "rle", "keypoints", "num_keypoints")
_CATEGORY = ("category", "category_id")


@dataclass(frozen=True)
class LabelObject:
    """One labelled object, in pixels of its image.

    Attributes:
        box: x, y, width, height.
        category: its number or name.
        polygons: each x, y, x, y, ...; empty if it has none.
        rle: the mask of a crowd, or of an object whose mask is no polygon.
        keypoints: (x, y, visibility), visibility 0 (not labelled), 1 (hidden) or 2 (visible).
        area: in square pixels; None if the source does not say.
        others: further fields, copied as they are.
    """

    box: Box
    category: Category
    polygons: tuple[Polygon, ...] = ()
    rle: Rle | None = None
    keypoints: tuple[tuple[float, float, int], ...] = ()
    area: float | None = None
    iscrowd: int = 0
    others: Mapping[str, Any] = field(default_factory=dict)

    def mask(self, size: Size) -> Array:
        """The object's pixels in an image of ``size``: bool (height, width).

        Without polygons and mask, its box. An object that is smaller than a pixel covers the pixels
        that it touches.
        """
        if self.rle is not None:
            pixels = decoded(self.rle)
        elif self.polygons:
            pixels = drawn(self.polygons, size)
        else:
            pixels = _filled([round(end) for end in _ends(self.box)], size)
        if pixels.any():
            return pixels
        x0, y0, x1, y1 = _ends(self.box)
        return _filled([math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)], size)


def _ends(box: Box) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _filled(ends: Sequence[int], size: Size) -> Array:
    """A mask of x0, y0, x1, y1: bool (height, width)."""
    pixels = np.zeros((size[1], size[0]), dtype=bool)
    pixels[ends[1] : ends[3], ends[0] : ends[2]] = True
    return pixels


def read_objects(
    value: object, size: Size, box_format: str, categories: Sequence[str] | None, column: str
) -> tuple[LabelObject, ...]:
    """Read a row's objects: a struct of lists (as Hugging Face has it) or a list of structs.

    Args:
        value: the row's value; None and an empty list mean that the image has no objects.
        size: (width, height) of the image that the objects lie in.
        box_format: ``coco`` (x, y, width, height), ``voc`` (x0, y0, x1, y1), both in pixels, or
            ``yolo`` (middle x, middle y, width, height as fractions of the size).
        categories: the names by number; None if they are not known.
        column: its name, for messages.

    Raises:
        RejectRow: ``bad-objects``: the message says which object and field, and what is allowed.
    """
    named = repr(column)
    found = [
        _read(one, size, box_format, categories, f"{named}, object {number}")
        for number, one in enumerate(_each(value, named))
    ]
    ids = [one.others["id"] for one in found if one.others.get("id") is not None]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise _bad(named, f"two objects with the id {twice}", "ids that are unique in their image")
    return tuple(found)


def _each(value: object, column: str) -> list[Mapping[str, Any]]:
    """The objects as one mapping each."""
    if value is None:
        return []
    if isinstance(value, list):
        if any(not isinstance(one, Mapping) for one in value):
            raise _bad(column, "a list with null or plain values", "a struct for each object")
        return value
    if not isinstance(value, Mapping):
        raise _bad(column, f"{type(value).__name__}", "a struct of lists, or a list of structs")
    lists = {name: one for name, one in value.items() if one is not None}
    lengths = {name: len(one) for name, one in lists.items() if isinstance(one, list)}
    if len(lengths) < len(lists):
        plain = next(name for name in lists if name not in lengths)
        raise _bad(column, f"field {plain!r} without a list", "one list for each field")
    if len(set(lengths.values())) > 1:
        raise _bad(column, f"lists of different lengths ({lengths})", "one entry for each object")
    count = next(iter(lengths.values()), 0)
    return [{name: one[number] for name, one in lists.items()} for number in range(count)]


def _read(
    given: Mapping[str, Any],
    size: Size,
    box_format: str,
    categories: Sequence[str] | None,
    where: str,
) -> LabelObject:
    shares = size if box_format == "yolo" else (1, 1)
    polygons, rle = _segmentation(given, where, shares, size)
    named = next((name for name in _CATEGORY if given.get(name) is not None), None)
    if named is None:
        raise _bad(where, "no category", "a number or name in `category`")
    rest = {name: one for name, one in given.items() if name not in ("bbox", *_CATEGORY, *KNOWN)}
    if "id" in given:
        rest["id"] = given["id"]
    area = given.get("area")
    return LabelObject(
        box=_box(given.get("bbox"), where, size, box_format),
        category=read_category(given[named], where, categories),
        polygons=polygons,
        rle=rle,
        keypoints=_keypoints(given.get("keypoints"), where, shares),
        area=None if area is None else _numbers([area], where, "area")[0],
        iscrowd=int(bool(given.get("iscrowd"))),
        others=rest,
    )


def _box(value: object, where: str, size: Size, box_format: str) -> Box:
    numbers = _numbers(value, where, "bbox")
    if len(numbers) != 4:
        raise _bad(where, f"bbox with {len(numbers)} numbers", "4 numbers")
    x, y, width, height = numbers
    if box_format == "voc":
        width, height = width - x, height - y
    elif box_format == "yolo":
        x, y = (x - width / 2) * size[0], (y - height / 2) * size[1]
        width, height = width * size[0], height * size[1]
    slack = [max(TOLERANCE_PX, TOLERANCE * side) for side in size]
    low, high = (x, y), (x + width, y + height)
    outside = any(
        one < -much or end > side + much
        for one, end, side, much in zip(low, high, size, slack, strict=True)
    )
    inside = clip((x, y, width, height), size)
    if min(width, height, inside[2], inside[3]) <= 0 or outside:
        raise _bad(
            where,
            f"bbox {_shown(numbers)}, which covers x {low[0]:g} to {high[0]:g} and y {low[1]:g} to "
            f"{high[1]:g} of an image of {size[0]} x {size[1]} pixels",
            f"boxes with a positive size inside of their image (labels.objects_format is "
            f"{box_format})",
        )
    return inside


def clip(box: Box, size: Size) -> Box:
    """The part of a box that lies in an image of ``size``; its sides may be 0."""
    ends = [
        (min(max(low, 0.0), side), min(max(low + length, 0.0), side))
        for low, length, side in zip(box[:2], box[2:], size, strict=True)
    ]
    (left, right), (top, bottom) = ends
    return float(left), float(top), float(right - left), float(bottom - top)


def read_category(value: object, where: str, categories: Sequence[str] | None) -> Category:
    """Check a category, given by its number or name.

    Returns:
        Its number, if the names of all are known; else the value itself.

    Raises:
        RejectRow: ``bad-objects``; ``where`` says what the value is.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _bad(where, f"category {value!r}", "a number or a name")
    if categories is None:
        return value
    known = ", ".join(categories[:5])
    if isinstance(value, int) and not 0 <= value < len(categories):
        allowed = f"0 to {len(categories) - 1} (labels.categories: {known}, ...)"
        raise _bad(where, f"category {value}", allowed)
    if isinstance(value, str) and value not in categories:
        raise _bad(where, f"category {value!r}", f"one of labels.categories ({known}, ...)")
    return categories.index(value) if isinstance(value, str) else value


def _segmentation(
    given: Mapping[str, Any], where: str, shares: Size, size: Size
) -> tuple[tuple[Polygon, ...], Rle | None]:
    value, rle = given.get("segmentation"), given.get("rle")
    if isinstance(value, Mapping):
        value, rle = None, value
    if isinstance(rle, Mapping) and all(one is None for one in rle.values()):
        rle = None  # how a struct of nulls is read
    if rle is not None:
        try:
            return (), read_rle(rle, size)
        except ValueError as error:
            raise _bad(where, str(error), f"a mask of {size[0]} x {size[1]} pixels") from error
    if value is None:
        return (), None
    polygons = []
    for one in value if isinstance(value, list) else [value]:
        numbers = _numbers(one, where, "segmentation")
        if len(numbers) < 6 or len(numbers) % 2:
            raise _bad(where, f"a polygon of {len(numbers)} numbers", "x and y of 3 points or more")
        polygons.append(tuple(n * shares[place % 2] for place, n in enumerate(numbers)))
    return tuple(polygons), None


def _keypoints(value: object, where: str, shares: Size) -> tuple[tuple[float, float, int], ...]:
    if value is None:
        return ()
    numbers = _numbers(value, where, "keypoints")
    if len(numbers) % 3:
        raise _bad(where, f"{len(numbers)} numbers of keypoints", "x, y and visibility of each")
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return tuple((x * shares[0], y * shares[1], int(seen)) for x, y, seen in triples)


def _numbers(value: object, where: str, what: str) -> list[float]:
    """A flat list of finite numbers."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _bad(where, f"{what} {value!r}", "a list of numbers")
    numbers = list(value)
    for one in numbers:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise _bad(where, f"{what} with the value {one!r}", "finite numbers")
    return [float(one) for one in numbers]


def _shown(numbers: list[float]) -> str:
    return f"[{', '.join(f'{one:g}' for one in numbers)}]"


def _bad(where: str, found: str, allowed: str) -> RejectRow:
    return RejectRow("bad-objects", f"column {where}: {found}; allowed: {allowed}")
