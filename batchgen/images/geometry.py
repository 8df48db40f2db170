"""Affine maps of pixels: what EXIF orientation, fitting and enlarging do to coordinates.

Coordinates are continuous: x runs from 0 (left edge of the first pixel) to the width (right edge of
the last one), y from 0 at the top. So the middle of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from batchgen.images.conditions import Resize, fitted_size, middle

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
Box = tuple[float, float, float, float]

_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Affine:
    """The map x' = xx * x + xy * y + x0, y' = yx * x + yy * y + y0.

    Every map here scales, moves, mirrors or turns by quarters, so it takes boxes to boxes.
    """

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0

    @property
    def numbers(self) -> tuple[float, float, float, float, float, float]:
        """The two rows of the matrix: xx, xy, x0, yx, yy, y0."""
        return (self.xx, self.xy, self.x0, self.yx, self.yy, self.y0)

    def then(self, other: Affine) -> Affine:
        """Return the map that applies this one first and then the other."""
        product = other._matrix() @ self._matrix()
        return Affine(*(float(value) for value in product[:2].ravel()))

    def inverse(self) -> Affine:
        """Return the map back. Raises numpy's LinAlgError for a scale of zero."""
        matrix = np.linalg.inv(self._matrix())
        return Affine(*(float(value) for value in matrix[:2].ravel()))

    def points(self, points: Array) -> Array:
        """Map points (n, 2); returns float64 (n, 2)."""
        matrix = self._matrix()
        moved: Array = points.astype(np.float64) @ matrix[:2, :2].T + matrix[:2, 2]
        return moved

    def box(self, box: Box) -> Box:
        """Map a box (x, y, width, height)."""
        x, y, width, height = box
        corners = self.points(np.array([(x, y), (x + width, y + height)], dtype=np.float64))
        low, high = corners.min(axis=0), corners.max(axis=0)
        left, top, right, bottom = (float(value) for value in (*low, *high))
        return left, top, right - left, bottom - top

    def _matrix(self) -> Array:
        return np.array([(self.xx, self.xy, self.x0), (self.yx, self.yy, self.y0), (0.0, 0.0, 1.0)])


def scaling(source: Size, target: Size) -> Affine:
    """Return the map of a resize from one (width, height) to another."""
    return Affine(xx=target[0] / source[0], yy=target[1] / source[1])


def fit_map(source: Size, target: Size, policy: Resize) -> Affine:
    """Return what `conditions.fit_image` does to coordinates.

    Args:
        source: (width, height) of the image.
        target: (width, height) that it is brought to.
        policy: see `conditions.fit_image`.
    """
    if policy == "stretch":
        return scaling(source, target)
    if policy == "multiple-of":
        left, top = middle(source, target)
        return Affine(x0=-left, y0=-top)
    if policy == "fit":
        inner = fitted_size(source, target)
        left, top = middle(target, inner)
        return scaling(source, inner).then(Affine(x0=left, y0=top))
    scale = max(target[0] / source[0], target[1] / source[1])
    crop = (target[0] / scale, target[1] / scale)  # as ImageOps.fit: in fractions of a pixel
    start = Affine(x0=-(source[0] - crop[0]) / 2, y0=-(source[1] - crop[1]) / 2)
    return start.then(Affine(xx=target[0] / crop[0], yy=target[1] / crop[1]))


# Orientation -> what it does to (x, y) of a stored image of size (w, h): rows of the matrix, where
# the offset is given in units of w and h. Source: EXIF 2.32, tag Orientation.
_TURNS: dict[int, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    1: ((1, 0, 0, 0), (0, 1, 0, 0)),
    2: ((-1, 0, 1, 0), (0, 1, 0, 0)),
    3: ((-1, 0, 1, 0), (0, -1, 0, 1)),
    4: ((1, 0, 0, 0), (0, -1, 0, 1)),
    5: ((0, 1, 0, 0), (1, 0, 0, 0)),
    6: ((0, -1, 0, 1), (1, 0, 0, 0)),
    7: ((0, -1, 0, 1), (-1, 0, 1, 0)),
    8: ((0, 1, 0, 0), (-1, 0, 1, 0)),
}


def orientation_of(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 if it has none.

    Raises:
        OSError: not an image.
    """
    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1


def orientation_map(orientation: int, upright: Size) -> Affine:
    """Return the map from the pixels of the stored image to those of the upright one.

    Args:
        orientation: 1 to 8, see `orientation_of`.
        upright: (width, height) of the upright image.
    """
    turned = orientation >= 5
    width, height = (upright[1], upright[0]) if turned else upright
    rows = [(xs, ys, ws * width + hs * height) for xs, ys, ws, hs in _TURNS[orientation]]
    return Affine(*(float(value) for row in rows for value in row))
