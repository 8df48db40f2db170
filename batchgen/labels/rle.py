"""Masks of objects as COCO has them, run lengths and polygons, by pycocotools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchgen.images.geometry import Array, Size

Polygon = tuple[float, ...]


@dataclass(frozen=True)
class Rle:
    """A mask as run lengths. ``size`` is (height, width), as in COCO; ``counts`` is compressed."""

    size: tuple[int, int]
    counts: str


def read_rle(value: Mapping[str, Any], size: Size) -> Rle:
    """Check a mask of an image of ``size`` (width, height); ``counts`` is text or a list.

    Raises:
        ValueError: it is of another size, or its runs do not add up to it.
    """
    from pycocotools import mask as coco

    given, counts = value.get("size"), value.get("counts")
    height, width = size[1], size[0]
    if given is None or list(given) != [height, width]:
        raise ValueError(f"rle of size {given}")
    if isinstance(counts, list):
        if not all(isinstance(one, int) and one >= 0 for one in counts):
            raise ValueError("rle with counts that are no run lengths")
        if sum(counts) != height * width:
            raise ValueError(f"rle whose runs add up to {sum(counts)} pixels")
        packed = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return Rle((height, width), packed["counts"].decode())
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if not isinstance(counts, str) or sum(_runs(counts)) != height * width:
        raise ValueError("rle whose counts are not those of this size")
    return Rle((height, width), counts)


def decoded(rle: Rle) -> Array:
    """The mask as bool (height, width)."""
    from pycocotools import mask as coco

    pixels: Array = coco.decode({"size": list(rle.size), "counts": rle.counts.encode()})
    return pixels.astype(bool)


def drawn(polygons: Sequence[Polygon], size: Size) -> Array:
    """The pixels that the polygons cover, in an image of ``size``: bool (height, width)."""
    from pycocotools import mask as coco

    packed = coco.frPyObjects([list(polygon) for polygon in polygons], size[1], size[0])
    pixels: Array = coco.decode(coco.merge(packed))
    return pixels.astype(bool)


def encoded(mask: Array) -> Rle:
    """The run lengths of a bool mask (height, width)."""
    from pycocotools import mask as coco

    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Rle((mask.shape[0], mask.shape[1]), packed["counts"].decode())


def _runs(text: str) -> list[int]:
    """The run lengths of a compressed mask; pycocotools does not check them and may crash.

    Format: pycocotools, ``rleFrString``: base 32 digits from character 48 on, the lowest first,
    and from the third run on the difference to the run before the last one.

    Raises:
        ValueError: the text is no such mask.
    """
    runs: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        while True:
            digit = ord(text[place]) - 48 if place < len(text) else -1
            if not 0 <= digit < 64 or shift > 60:
                raise ValueError("rle whose counts cannot be read")
            value |= (digit & 0x1F) << shift
            place, shift = place + 1, shift + 5
            if not digit & 0x20:
                if digit & 0x10:
                    value |= -1 << shift
                break
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("rle with a negative run")
        runs.append(value)
    return runs
