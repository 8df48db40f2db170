"""The training images: scikit-learn's handwritten digits (a written split) and drawn shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from torch.nn import functional

from jobs.small_model.recipe import IMAGE_SIZE

SHAPES: Final = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 36, 40),
    "orange": (246, 134, 24),
    "yellow": (246, 222, 48),
    "green": (36, 160, 64),
    "blue": (36, 80, 214),
    "purple": (136, 48, 168),
    "white": (244, 244, 244),
    "black": (16, 16, 16),
}
COLOUR_NAMES: Final = tuple(COLOURS)
SIZES: Final = ("small", "", "large")  # "" is the middle: no caption names it
DIGIT_TEST_COUNT: Final = 500
SPLIT_SEED: Final = 0
SUPERSAMPLE: Final = 4  # shapes are drawn this much larger, then averaged: clean edges


@dataclass(frozen=True)
class DigitSplit:
    """Indices into ``load_digits()``; the model sees ``train`` only."""

    train: tuple[int, ...]
    test: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The split as JSON-ready values, to be written beside the weights."""
        return {
            "dataset": "sklearn.datasets.load_digits",
            "seed": SPLIT_SEED,
            "train": list(self.train),
            "test": list(self.test),
        }


@dataclass(frozen=True)
class LabelledImages:
    """Images with their labels: ``images`` (N, 3, 32, 32) uint8, ``labels`` (N, K) int64.

    The columns of ``labels`` are the digit (K = 1), or the shape, object colour, background
    colour and size (K = 4).
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.images.shape[0]


def digit_split() -> DigitSplit:
    """1,297 training and 500 held-out indices, the same on every machine."""
    count = len(load_digits().target)
    # The legacy generator's stream is frozen by numpy's compatibility promise.
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    test, train = order[:DIGIT_TEST_COUNT], order[DIGIT_TEST_COUNT:]
    return DigitSplit(
        train=tuple(sorted(int(i) for i in train)), test=tuple(sorted(int(i) for i in test))
    )


def digit_images(indices: tuple[int, ...]) -> LabelledImages:
    """The digits at ``indices`` as white strokes on black, 8x8 enlarged to 32x32."""
    bunch = load_digits()
    chosen = list(indices)
    grey = torch.from_numpy(bunch.images[chosen] / 16.0).float()[:, None]  # (N, 1, 8, 8) in 0..1
    large = functional.interpolate(grey, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    labels = torch.from_numpy(bunch.target[chosen]).long()[:, None]  # (N, 1)
    return LabelledImages(_to_bytes(large.expand(-1, 3, -1, -1)), labels)


def augmented_digits(source: LabelledImages, copies: int, seed: int) -> LabelledImages:
    """``source`` and ``copies`` slightly moved versions of it, so that few are learnt by heart.

    The moves stay under a third of an original 8x8 pixel: more would leave the distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    images, count = [source.images], len(source)
    for _ in range(copies):
        u = torch.rand(count, 4, generator=generator) * 2 - 1  # (N, 4) in -1..1
        angle, scale = u[:, 0] * math.radians(6), 1 + 0.05 * u[:, 1]
        shift = u[:, 2:] * (1.25 * 2 / IMAGE_SIZE)  # (N, 2), in units of half an image
        cos, sin = scale * angle.cos(), scale * angle.sin()
        top = torch.stack((cos, -sin, shift[:, 0]), 1)  # (N, 3)
        bottom = torch.stack((sin, cos, shift[:, 1]), 1)  # (N, 3)
        theta = torch.stack((top, bottom), 1)  # (N, 2, 3)
        grid = functional.affine_grid(theta, list(source.images.shape), align_corners=False)
        moved = functional.grid_sample(source.images / 255.0, grid, align_corners=False)
        images.append(_to_bytes(moved))
    return LabelledImages(torch.cat(images), source.labels.repeat(copies + 1, 1))


def drawn_shapes(count: int, seed: int) -> LabelledImages:
    """``count`` captionable pictures of one flat-coloured shape on a flat background."""
    rng = np.random.RandomState(seed)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)  # (N, H, W, 3)
    labels = np.empty((count, 4), dtype=np.int64)  # (N, 4)
    for row in range(count):
        shape, size = rng.randint(len(SHAPES)), rng.randint(len(SIZES))
        front, back = rng.choice(len(COLOURS), size=2, replace=False)
        mask = _shape_mask(SHAPES[shape], _diameter(SIZES[size], rng), rng)[..., None]  # (H, W, 1)
        fill = _jittered(COLOUR_NAMES[front], rng)
        ground = _jittered(COLOUR_NAMES[back], rng)
        images[row] = np.rint(mask * fill + (1 - mask) * ground).astype(np.uint8)
        labels[row] = shape, front, back, size
    return LabelledImages(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    )


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32 in -1..1, what the VAE reads."""
    return images.float() / 127.5 - 1.0


def _to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _diameter(size: str, rng: np.random.RandomState) -> float:
    low, high = {"small": (16.0, 18.5), "": (19.5, 23.0), "large": (24.0, 28.0)}[size]
    return float(rng.uniform(low, high))


def _jittered(colour: str, rng: np.random.RandomState) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-8, 8, size=3), 0, 255)  # (3,)


def _shape_mask(
    shape: str, diameter: float, rng: np.random.RandomState
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much of each pixel the shape covers, (H, W) in 0..1."""
    side = IMAGE_SIZE * SUPERSAMPLE
    slack = max(0.0, (IMAGE_SIZE - 2 - diameter) / 2)
    centre = IMAGE_SIZE / 2 + rng.uniform(-1, 1, size=2) * min(slack, 4.0)  # (2,) pixels
    angle = math.radians(float(rng.uniform(-10, 10)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    for outline, value in _outlines(shape):
        points = (outline @ turn.T * diameter / 2 + centre) * SUPERSAMPLE  # (P, 2)
        pen.polygon([(float(x), float(y)) for x, y in points], fill=value)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float64) / 255.0


def _outlines(shape: str) -> list[tuple[np.ndarray[Any, np.dtype[np.float64]], int]]:
    """Polygons (P, 2) in a disc of radius about 1, each with the value it is filled with."""
    if shape == "circle":
        return [(_ray_points(64, (1.0,)), 255)]
    if shape == "ring":
        return [(_ray_points(64, (1.0,)), 255), (_ray_points(64, (0.55,)), 0)]
    if shape == "square":
        return [(_ray_points(4, (1.2,), turn=math.pi / 4), 255)]
    if shape == "triangle":
        return [(_ray_points(3, (1.15,)) + np.array([0.0, 0.2]), 255)]
    if shape == "star":
        return [(_ray_points(10, (1.12, 0.45)), 255)]
    if shape == "cross":
        a, b = 1.0, 0.34
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        return [(np.array(corners + [(-x, -y) for x, y in corners]), 255)]
    raise ValueError(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")


def _ray_points(
    count: int, radii: tuple[float, ...], turn: float = 0.0
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``count`` points round the origin, the first one straight up, radii taken in turn."""
    angles = turn + 2 * math.pi * np.arange(count) / count
    lengths = np.array([radii[i % len(radii)] for i in range(count)])
    return np.stack((lengths * np.sin(angles), -lengths * np.cos(angles)), axis=1)  # (P, 2)
