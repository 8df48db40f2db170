"""Perceptual hashes: 64 bits of an image's coarse structure, as imagehash's phash has them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]
SIDE, KEPT = 32, 8
_NOISE = 9  # binary digits below the largest coefficient's that rounding errors may change: 52 - 9


def perceptual_hash(pixels: Array) -> int:
    """Hash an image, uint8 RGB (height, width, 3).

    The image becomes grey, 32 x 32 (Lanczos). A bit is set where one of the 8 x 8 lowest
    coefficients of its cosine transform is above their median; the first bit is the highest.
    Coefficients that differ by rounding errors only count as equal: of a flat image no bit but the
    first is set.
    """
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    levels = np.asarray(grey, np.float64)
    cosines = _cosines()
    lowest = _product(_product(cosines, levels), cosines.T)  # (8, 8)
    unit = np.ldexp(1.0, int(np.frexp(np.abs(lowest).max())[1]) - 52 + _NOISE)
    lowest = np.round(lowest / unit)
    bits = (lowest > np.median(lowest)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _product(left: Array, right: Array) -> Array:
    """A product of matrices whose sums have the same order on every machine."""
    product: Array = (left[:, :, None] * right[None, :, :]).sum(axis=1)
    return product


@cache
def _cosines() -> Array:
    """The lowest 8 rows of the cosine transform (DCT-II) of 32 values, shape (8, 32)."""
    frequency, place = np.arange(KEPT)[:, None], np.arange(SIDE)[None, :]
    cosines: Array = 2.0 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))
    return cosines
