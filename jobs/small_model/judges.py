"""The classifiers the model is measured by; they learn from real or drawn images only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.svm import SVC
from torch import nn
from torch.nn import functional

from jobs.small_model.data import (
    COLOUR_NAMES,
    SHAPES,
    digit_images,
    digit_split,
    drawn_shapes,
    to_model_range,
)
from jobs.small_model.loop import step_generator

# Apart from the training job's seeds: the judge never saw the generator's drawings.
JUDGE_SEED = 1_000
DRAWN_IMAGES = 24_000
HELD_OUT_IMAGES = 2_000
JUDGE_STEPS = 1_500
JUDGE_BATCH = 64


@dataclass(frozen=True)
class DigitJudge:
    """An SVM on 8x8 pixels, fitted to the real training split; ``accuracy`` on the held out."""

    svm: SVC
    accuracy: float

    def digits(self, images: torch.Tensor) -> torch.Tensor:
        """The digit (N,) int64 in each of ``images`` (N, 3, 32, 32) uint8."""
        return torch.from_numpy(self.svm.predict(digit_features(images).numpy())).long()


@dataclass(frozen=True)
class ShapeJudge:
    """A convolutional network fitted to drawn shapes; accuracies on freshly drawn ones."""

    network: nn.Module
    accuracies: tuple[float, float, float]

    @torch.no_grad()
    def labels(self, images: torch.Tensor) -> torch.Tensor:
        """Shape, object colour, background colour (N, 3) int64 of ``images`` (N, 3, 32, 32)."""
        parts = [
            torch.stack([head.argmax(1) for head in _heads(self.network, to_model_range(batch))], 1)
            for batch in images.split(256)
        ]
        return torch.cat(parts)


def digit_features(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, 32, 32) back to the data set's own form: (N, 64) in 0..16."""
    small = functional.avg_pool2d(images.float().mean(1, keepdim=True), 4)  # (N, 1, 8, 8)
    return (small / 255 * 16).flatten(1)


def fit_digit_judge() -> DigitJudge:
    """Fit on the 1,297 real training digits, score on the 500 held-out ones."""
    split = digit_split()
    train, test = digit_images(split.train), digit_images(split.test)
    svm = SVC(gamma=0.001, C=10.0)
    svm.fit(digit_features(train.images).numpy(), train.labels[:, 0].numpy())
    score = svm.score(digit_features(test.images).numpy(), test.labels[:, 0].numpy())
    return DigitJudge(svm, float(score))


def fit_shape_judge(steps: int = JUDGE_STEPS, images: int = DRAWN_IMAGES) -> ShapeJudge:
    """Fit on freshly drawn shapes, some blurred or noisy: no generated image is exactly flat."""
    torch.manual_seed(JUDGE_SEED)
    drawn = drawn_shapes(images, JUDGE_SEED)
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        generator = step_generator(JUDGE_SEED, step)
        i = torch.randint(len(drawn), (JUDGE_BATCH,), generator=generator)  # (B,)
        x = worn(to_model_range(drawn.images[i]), generator)  # (B, 3, 32, 32)
        y = drawn.labels[i]  # (B, 4)
        heads = _heads(network, x)
        losses = [functional.cross_entropy(head, y[:, k]) for k, head in enumerate(heads)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        rate.step()
    judge = ShapeJudge(network.eval(), (0.0, 0.0, 0.0))
    fresh = drawn_shapes(HELD_OUT_IMAGES, JUDGE_SEED + 1)
    right = (judge.labels(fresh.images) == fresh.labels[:, :3]).float().mean(0)  # (3,)
    shape, front, back = right.tolist()
    return ShapeJudge(network, (shape, front, back))


def _network() -> nn.Module:
    widths = (3, 32, 48, 64, 96)
    layers: list[nn.Module] = []
    for level, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(a, b, 3, 2 if level else 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
    outputs = len(SHAPES) + 2 * len(COLOUR_NAMES)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, outputs))


def _heads(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    sizes = (len(SHAPES), len(COLOUR_NAMES), len(COLOUR_NAMES))
    return network(x).split(sizes, dim=1)  # (B, 6), (B, 8), (B, 8)


def worn(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``x`` (B, 3, 32, 32), each row blurred by its own amount and with faint noise."""
    amount = torch.rand(len(x), 1, 1, 1, generator=generator)  # (B, 1, 1, 1)
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    blurred = functional.avg_pool2d(padded, 3, stride=1)  # (B, 3, 32, 32)
    noise = torch.randn(x.shape, generator=generator) * 0.03
    return x.lerp(blurred, amount) + noise
