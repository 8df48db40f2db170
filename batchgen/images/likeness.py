"""How alike two images are, pixel by pixel, whatever their brightness, contrast and small crops."""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np

from batchgen.images.perceptual_hash import CROPS, SIDE

Array = np.ndarray[Any, Any]

_HALF = SIDE // 2
_GREY, _COLOUR = SIDE * SIDE, _HALF * _HALF
PLANES = _GREY + 2 * _COLOUR  # bytes of an image
_WEIGHT = 2.0  # of a colour value: there are a quarter as many as grey values
_COARSE = 4  # the coarse values are means of so many pixels a side
_FLAT = float(SIDE)  # a norm below this, one level a pixel, is noise


def planes(pixels: Array) -> Array:
    """The image in 1,536 bytes: 32 x 32 levels of grey, and 16 x 16 of each of its two colours.

    Args:
        pixels: uint8 RGB (height, width, 3).
    """
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    levels = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)
    colours = cv2.resize(levels[..., 1:], (_HALF, _HALF), interpolation=cv2.INTER_AREA)
    return np.concatenate([levels[..., 0].ravel(), colours.transpose(2, 0, 1).ravel()])


def mirrored(images: Array) -> Array:
    """The planes (n, 1536) of the same images, mirrored left to right."""
    grey, colours = _split(images)
    return _joined(grey[..., ::-1], colours[..., ::-1])


def coarse(images: Array) -> Array:
    """Vectors (n, 96) of the planes (n, 1536); of images that are alike the products are high."""
    grey, colours = _split(images.astype(np.float32))
    small = [_means(grey, SIDE // _COARSE), _WEIGHT * _means(colours, _HALF // _COARSE)]
    centred = [one - one.mean(axis=(-2, -1), keepdims=True) for one in small]
    return _unit(np.concatenate([one.reshape(len(images), -1) for one in centred], axis=1))


def likeness(first: Array, second: Array) -> Array:
    """How alike n pairs of images are: the highest correlation of one with a crop of the other.

    1 is the same image up to brightness and contrast, 0 or less is nothing in common. Images of
    one colour are like nothing.

    Args:
        first, second: planes (n, 1536).
    """
    if not len(first):
        return np.zeros(0, np.float32)
    one, other = first.astype(np.float32), second.astype(np.float32)
    vectors = [_vectors(one), _vectors(other)]
    best = np.einsum("ij,ij->i", *vectors)
    for crop in range(1, len(CROPS)):
        for images, vector in ((one, vectors[1]), (other, vectors[0])):
            cropped = _vectors(_cropped(images, crop))
            best = np.maximum(best, np.einsum("ij,ij->i", cropped, vector))
    return np.asarray(best, np.float32)


def _split(images: Array) -> tuple[Array, Array]:
    """Grey (n, 32, 32) and colours (n, 2, 16, 16)."""
    count = len(images)
    grey = images[:, :_GREY].reshape(count, SIDE, SIDE)
    return grey, images[:, _GREY:].reshape(count, 2, _HALF, _HALF)


def _joined(grey: Array, colours: Array) -> Array:
    count = len(grey)
    return np.concatenate([grey.reshape(count, -1), colours.reshape(count, -1)], axis=1)


def _means(images: Array, side: int) -> Array:
    """Means of squares: images (..., h, h) to (..., side, side)."""
    each = images.shape[-1] // side
    shape = (*images.shape[:-2], side, each, side, each)
    means: Array = images.reshape(shape).mean(axis=(-3, -1))
    return means


def _vectors(images: Array) -> Array:
    """Vectors of length 1 of float planes, each plane around its mean."""
    grey, colours = _split(images)
    grey = grey - grey.mean(axis=(-2, -1), keepdims=True)
    colours = _WEIGHT * (colours - colours.mean(axis=(-2, -1), keepdims=True))
    return _unit(_joined(grey, colours))


def _unit(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = np.where(norms < _FLAT, 0, vectors / np.maximum(norms, _FLAT))
    return unit


def _cropped(images: Array, crop: int) -> Array:
    """The float planes of images after one of CROPS."""
    left, top, right, bottom = CROPS[crop]
    grey, colours = _split(images)
    return _joined(
        *(
            _resampling(side, top, bottom) @ some @ _resampling(side, left, right).T
            for side, some in ((SIDE, grey), (_HALF, colours))
        )
    )


@cache
def _resampling(side: int, start: float, end: float) -> Array:
    """The matrix that cuts fractions from both ends of a line and enlarges the rest linearly."""
    places = start * side + (np.arange(side) + 0.5) * (1 - start - end) - 0.5
    lower = np.clip(np.floor(places).astype(int), 0, side - 1)
    upper = np.minimum(lower + 1, side - 1)
    share = np.clip(places - lower, 0, 1)
    matrix = np.zeros((side, side), np.float32)
    np.add.at(matrix, (np.arange(side), lower), 1 - share)
    np.add.at(matrix, (np.arange(side), upper), share)
    return matrix
