"""The classifiers that measure a benefit: a small network on pixels, a linear one on features.

Both are trained for a fixed number of steps, on one thread, from a seed: the same images and seed
give the same weights on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, Any]
ClassifierName = Literal["cnn", "logistic"]

STEPS = 200  # of the network
BATCH = 32
ITERATIONS = 100  # of the linear classifier, each over all of its images
# What validation chooses from, with real images only: learning rates, and penalties.
CHOICES: dict[str, tuple[float, ...]] = {"cnn": (1e-3, 3e-3, 1e-2), "logistic": (0.01, 0.1, 1.0)}
USUAL: dict[str, float] = {"cnn": 3e-3, "logistic": 0.1}  # without a validation set
FLOOR = 0.05  # least deviation of a feature, as a share of the root mean square of all deviations
DEGREES, SHIFT, ZOOM = 10.0, 0.08, 0.1  # most rotation, shift (of the side) and change of scale


@dataclass(frozen=True)
class Part:
    """Images that a classifier learns from.

    Attributes:
        images: uint8 (n, side, side, 3), or features float32 (n, d).
        classes: (n,) numbers.
        moved: rotate, shift and scale each image anew whenever it is drawn (only images).
    """

    images: Array
    classes: Array
    moved: bool = False


@contextmanager
def one_thread(seed: int) -> Iterator[torch.Generator]:
    """Torch with one thread and its random numbers from the seed; both as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_num_threads(threads)


def network(classes: int) -> nn.Module:
    """Three convolutions with 16, 32 and 64 channels, and a linear layer on 2 x 2 means."""
    layers: list[nn.Module] = []
    before = 3
    for width in (16, 32, 64):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        before = width
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, classes)]
    return nn.Sequential(*layers)


def cnn_accuracies(
    parts: Sequence[Part],
    tests: Sequence[Part],
    classes: int,
    rate: float,
    seed: int,
    steps: int = STEPS,
) -> list[float]:
    """Train the network and return its accuracy on each test set.

    Each batch has the same number of images of each part, so that few real images are not lost
    among many synthetic ones.
    """
    with one_thread(seed) as generator:
        model = network(classes)
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        given = [(_tensor(one.images), torch.from_numpy(one.classes), one.moved) for one in parts]
        model.train()
        for _ in range(steps):
            pixels, labels = _batch(given, generator)
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            return [_accuracy(model, one) for one in tests]


def _tensor(images: Array) -> torch.Tensor:
    """(n, side, side, 3) uint8 to (n, 3, side, side) uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _scaled(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in -1..1."""
    return images.float() / 127.5 - 1.0


def _batch(
    given: Sequence[tuple[torch.Tensor, torch.Tensor, bool]], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = [], []
    share = BATCH // len(given)
    for images, classes, moved in given:
        places = torch.randint(len(images), (share,), generator=generator)
        drawn = _scaled(images[places])
        pixels.append(move(drawn, generator) if moved else drawn)
        labels.append(classes[places])
    return torch.cat(pixels), torch.cat(labels)


def move(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate, shift and scale each image (B, 3, H, W) by its own random amount; edges repeat."""
    u = torch.rand(len(pixels), 4, generator=generator) * 2 - 1  # (B, 4) in -1..1
    angle = torch.deg2rad(DEGREES * u[:, 0])
    scale = 1 + ZOOM * u[:, 1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 2 * SHIFT * u[:, 2:]  # in units of half an image
    top = torch.stack((cos, -sin, shift[:, 0]), 1)
    bottom = torch.stack((sin, cos, shift[:, 1]), 1)
    grid = nn.functional.affine_grid(
        torch.stack((top, bottom), 1), list(pixels.shape), align_corners=False
    )
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def moved_copies(pixels: Array, copies: int, seed: int) -> list[Array]:
    """Moved copies of one image, uint8 (height, width, 3), as the network's batches have them."""
    generator = torch.Generator().manual_seed(seed)
    repeated = _scaled(_tensor(np.array(pixels[None]))).expand(copies, -1, -1, -1)
    found = (move(repeated, generator) + 1) * 127.5
    return list(found.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _accuracy(model: nn.Module, test: Part) -> float:
    images, right = _tensor(test.images), 0
    for start in range(0, len(images), 256):
        scores = model(_scaled(images[start : start + 256]))
        truth = torch.from_numpy(test.classes[start : start + 256])
        right += int((scores.argmax(1) == truth).sum())
    return right / len(images)


def logistic_accuracies(
    parts: Sequence[Part], tests: Sequence[Part], classes: int, penalty: float, seed: int
) -> list[float]:
    """Fit a multinomial logistic regression on features; return its accuracy on each test set.

    Features are standardised by all parts together, with the weights that they are trained with.
    Each part has the same weight, as in the network's batches. The seed changes nothing: the
    problem is convex, and starts at zero.
    """
    mean, deviation = _spread(parts)

    def standard(images: Array) -> torch.Tensor:
        return torch.from_numpy((images.astype(np.float64) - mean) / deviation)

    with one_thread(seed):
        inputs = torch.cat([standard(one.images) for one in parts])
        labels = torch.cat([torch.from_numpy(one.classes) for one in parts])
        weights = torch.cat(
            [torch.full((len(one.classes),), 1 / len(one.classes) / len(parts)) for one in parts]
        ).double()
        matrix = torch.zeros(inputs.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [matrix], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-7
        )

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            each = nn.functional.cross_entropy(_scores(inputs, matrix), labels, reduction="none")
            fit: torch.Tensor = (weights * each).sum()
            loss: torch.Tensor = fit + penalty * (matrix[:-1] ** 2).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            found = [_scores(standard(one.images), matrix).argmax(1).numpy() for one in tests]
    return [float((f == one.classes).mean()) for f, one in zip(found, tests, strict=True)]


def _spread(parts: Sequence[Part]) -> tuple[Array, Array]:
    """Means and deviations of the features over all parts, each part with the same weight.

    A feature that is the same in all images gets a floor, so that it cannot be blown up in others.
    """
    means = np.stack([one.images.mean(axis=0, dtype=np.float64) for one in parts])
    mean = means.mean(axis=0)
    squares = [((one.images.astype(np.float64) - mean) ** 2).mean(axis=0) for one in parts]
    deviation = np.sqrt(np.mean(squares, axis=0))
    floor = FLOOR * float(np.sqrt((deviation**2).mean()))
    return mean, np.maximum(deviation, floor or 1.0)


def _scores(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return inputs @ matrix[:-1] + matrix[-1]
