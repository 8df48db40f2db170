"""Moves labels with the pixels of their image: the same affine map, cut at the border."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchgen.images.geometry import Affine, Array, Size
from batchgen.labels.objects import LabelObject, clip
from batchgen.labels.rle import Polygon, decoded, encoded

Point = tuple[float, float]
ROUNDING = 1e-9
LEAST_SIDE_PX = 1e-3  # of what is left of a box; the output rounds to a tenth of it


@dataclass(frozen=True)
class Move:
    """What happened to the pixels of an image: a map from one size to another.

    Attributes:
        by: the map of coordinates.
        source: (width, height) before.
        target: (width, height) after.
    """

    by: Affine
    source: Size
    target: Size

    def object(self, one: LabelObject) -> tuple[LabelObject | None, float]:
        """The object after the move, cut at the border, and the share of its box that is left.

        None if nothing is left. The area of an object that is cut is counted again: of its polygons
        or mask, else it shrinks with its box.
        """
        whole = self.by.box(one.box)
        box = clip(whole, self.target)
        area = whole[2] * whole[3]
        share = box[2] * box[3] / area if area > 0 else 0.0
        if share <= 0 or min(box[2:]) < LEAST_SIDE_PX:
            return None, 0.0
        polygons = tuple(self._polygon(polygon) for polygon in one.polygons)
        polygons = tuple(polygon for polygon in polygons if polygon)
        rle = None if one.rle is None else encoded(self.mask(decoded(one.rle)))
        scale = abs(self.by.xx * self.by.yy - self.by.xy * self.by.yx)
        size = None if one.area is None else one.area * scale * share
        is_cut = size is not None and share < 1 - ROUNDING
        if polygons and is_cut:
            size = sum(polygon_area(polygon) for polygon in polygons)
        if rle is not None and is_cut:
            size = float(decoded(rle).sum())
        moved = LabelObject(
            box=box,
            category=one.category,
            polygons=polygons,
            rle=rle,
            keypoints=tuple(self._keypoint(point) for point in one.keypoints),
            area=size,
            iscrowd=one.iscrowd,
            others=one.others,
        )
        return moved, share

    def mask(self, mask: Array, fill: int = 0) -> Array:
        """Resample a label mask (height, width) by nearest neighbour; ``fill`` is for padding."""
        width, height = self.target
        turned = self.by.xx == 0  # by a quarter: rows of the target are columns of the source
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        back = self.by.inverse()
        across = np.floor(back.points(np.stack([x, np.zeros(width)], axis=1))).astype(np.int64)
        down = np.floor(back.points(np.stack([np.zeros(height), y], axis=1))).astype(np.int64)
        columns, rows = (down[:, 0], across[:, 1]) if turned else (across[:, 0], down[:, 1])
        padded = np.pad(mask, 1, constant_values=fill)  # an index outside means the padding
        columns = np.clip(columns, -1, mask.shape[1]) + 1
        rows = np.clip(rows, -1, mask.shape[0]) + 1
        moved: Array = padded[np.ix_(rows, columns)]
        return np.ascontiguousarray(moved.T if turned else moved)

    def _polygon(self, polygon: Polygon) -> Polygon:
        points = self.by.points(np.array(_pairs(polygon)))
        cut = cut_polygon([(float(x), float(y)) for x, y in points], self.target)
        return tuple(value for point in cut for value in point)

    def _keypoint(self, point: tuple[float, float, int]) -> tuple[float, float, int]:
        """A keypoint outside of the image is no longer labelled: 0, 0, 0, as in COCO."""
        x, y, seen = point
        if not seen:
            return 0.0, 0.0, 0
        ((x, y),) = self.by.points(np.array([(x, y)])).tolist()
        width, height = self.target
        return (x, y, seen) if 0 <= x < width and 0 <= y < height else (0.0, 0.0, 0)


def cut_polygon(points: list[Point], size: Size) -> list[Point]:
    """Cut a polygon at the border of an image (Sutherland and Hodgman, 1974); empty if outside."""
    for axis, side in enumerate(size):
        points = _cut(points, axis, 0.0, 1.0)
        points = _cut(points, axis, float(side), -1.0)
    return points if len(points) >= 3 else []


def _cut(points: list[Point], axis: int, bound: float, sign: float) -> list[Point]:
    kept: list[Point] = []
    for last, point in pairwise([*points[-1:], *points]):
        was, inside = (sign * (one[axis] - bound) >= 0 for one in (last, point))
        if was != inside:
            kept.append(_crossing(last, point, axis, bound))
        if inside:
            kept.append(point)
    return kept


def _crossing(one: Point, two: Point, axis: int, bound: float) -> Point:
    share = (bound - one[axis]) / (two[axis] - one[axis])
    other = one[1 - axis] + share * (two[1 - axis] - one[1 - axis])
    return (bound, other) if axis == 0 else (other, bound)


def _pairs(polygon: Polygon) -> list[Point]:
    return list(zip(polygon[::2], polygon[1::2], strict=True))


def polygon_area(polygon: Polygon) -> float:
    """The area of a polygon in square pixels (Gauss's formula)."""
    points = _pairs(polygon)
    turned = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turned)) / 2
