"""Perceptual hashes: 64 bits of the coarse structure, equal to those of imagehash's phash."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

BITS = 64
SIDE, KEPT = 32, 8
_NOISE = 9  # binary digits below the largest coefficient's that rounding errors may change: 52 - 9
_BASE = 64  # the side of the reduced image whose crops are hashed
_PART = 1 / SIDE
# What is cut from the left, the top, the right and the bottom, as fractions: nothing, one side, a
# corner, and a border. A crop of up to 1/32 on each side is near one of these.
CROPS = (
    (0.0, 0.0, 0.0, 0.0),
    (_PART, 0.0, 0.0, 0.0),
    (0.0, _PART, 0.0, 0.0),
    (0.0, 0.0, _PART, 0.0),
    (0.0, 0.0, 0.0, _PART),
    (_PART, _PART, 0.0, 0.0),
    (0.0, _PART, _PART, 0.0),
    (0.0, 0.0, _PART, _PART),
    (_PART, 0.0, 0.0, _PART),
    (_PART, _PART, _PART, _PART),
    (_PART / 2, _PART / 2, _PART / 2, _PART / 2),
)


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


def crop_hashes(pixels: Array) -> Array:
    """The hashes (uint64) of an image after each of CROPS; the first is that of the image.

    The others find crops, and are computed from a reduced image, so they may differ by some bits
    from the hash of an image that is cropped so.
    """
    grey = Image.fromarray(pixels).convert("L")
    by = Image.Resampling.BOX if min(grey.size) >= _BASE else Image.Resampling.BICUBIC
    base = np.asarray(grey.resize((_BASE, _BASE), by), np.float32)
    lowest = np.stack(
        [
            _lowest_of(top, bottom) @ base @ _lowest_of(left, right).T
            for left, top, right, bottom in CROPS[1:]
        ]
    ).reshape(-1, BITS)
    ordered = np.partition(lowest, (BITS // 2 - 1, BITS // 2), axis=1)
    median = ordered[:, BITS // 2 - 1 : BITS // 2 + 1].mean(axis=1, keepdims=True)
    packed = np.packbits(lowest > median, axis=1).view(">u8").ravel()
    first = np.array([perceptual_hash(pixels)], np.uint64)
    return np.concatenate([first, packed.astype(np.uint64)])


@cache
def _lowest_of(start: float, end: float) -> Array:
    """The matrix (8, 64) from a line of the reduced image to the lowest frequencies of its crop."""
    line = Image.fromarray(np.eye(_BASE, dtype=np.float32))
    box = (0, start * _BASE, _BASE, (1 - end) * _BASE)
    small = line.resize((_BASE, SIDE), Image.Resampling.LANCZOS, box)  # (32, 64)
    matrix: Array = (_cosines() @ np.asarray(small, np.float64)).astype(np.float32)
    return matrix


def distances(first: Array, second: Array) -> Array:
    """In how many bits hashes (uint64) differ, element by element."""
    count: Array = np.bitwise_count(np.bitwise_xor(first, second))
    return count


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
