"""Perceptual hashes: 64 bits of an image that change little when it is re-encoded or resized."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

BITS = 64
_SIDE = 32  # the image is reduced to so many grey pixels a side
_KEPT = 8  # frequencies a side
_DIGITS = 2  # coefficients go up to a million; less than that is rounding, not the image


def _cosines() -> Array:
    """The DCT-II of a line of 32 pixels, lowest 8 frequencies, as a matrix (8, 32)."""
    places = (2 * np.arange(_SIDE) + 1) * np.pi / (2 * _SIDE)
    waves: Array = 2 * np.cos(np.arange(_KEPT)[:, None] * places[None, :])
    return waves


_DCT = _cosines()
_WEIGHTS = np.uint64(1) << np.arange(BITS - 1, -1, -1, dtype=np.uint64)


def perceptual_hash(pixels: Array) -> np.uint64:
    """The hash of an image: which of its 8 x 8 lowest frequencies are above their median.

    It is the ``phash`` of the library imagehash, with its first bit as the highest of the number,
    except where a coefficient and the median differ by less than 0.01. So an image of one
    colour has a hash that does not depend on rounding.

    Args:
        pixels: uint8 RGB (height, width, 3).
    """
    small = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    found = (_DCT @ np.asarray(small, np.float64) @ _DCT.T).round(_DIGITS)
    bits = (found > np.median(found)).ravel()
    return np.uint64(_WEIGHTS[bits].sum(dtype=np.uint64))


def distances(first: Array, second: Array) -> Array:
    """In how many bits hashes (uint64) differ, element by element."""
    count: Array = np.bitwise_count(np.bitwise_xor(first, second))
    return count
