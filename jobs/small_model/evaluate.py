"""Measure an exported model against its bars and write the figures into its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from jobs.small_model.captions import digit_caption, shape_caption
from jobs.small_model.card import CARD_FILE, SHEET_FILE, read_card, write_readme
from jobs.small_model.data import (
    COLOUR_NAMES,
    SHAPES,
    digit_images,
    digit_split,
)
from jobs.small_model.judges import digit_features, fit_digit_judge, fit_shape_judge

EVALUATION_SEED: Final = 2_000
BATCH: Final = 50
SHEET_COLUMNS: Final = 16
BARS: Final = {
    "digit_agreement": 0.97,
    "object_colour_agreement": 0.95,
    "background_colour_agreement": 0.95,
    "shape_agreement": 0.90,
}


def evaluate(directory: Path, images: int) -> dict[str, Any]:
    """Measure ``images`` digits and as many shapes; fills in card.json, README.md, sheet.png."""
    card = read_card(directory)
    pipeline = load(directory)
    digits = torch.arange(images) % 10  # (N,)
    shapes = shape_requests(images)  # (N, 3)
    digit_pictures = generate(pipeline, [digit_caption(d) for d in digits.tolist()], card, 0)
    shape_pictures = generate(pipeline, [_shape_text(r) for r in shapes.tolist()], card, 1)
    metrics = {
        "images_per_bar": images,
        **digit_metrics(digit_pictures, digits),
        **shape_metrics(shape_pictures, shapes),
    }
    metrics["bars"] = BARS
    metrics["bars_met"] = all(metrics[name] >= bar for name, bar in BARS.items())
    card["metrics"] = metrics
    (directory / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    rows = torch.cat((shape_pictures[: 6 * SHEET_COLUMNS], digit_pictures[: 3 * SHEET_COLUMNS]))
    contact_sheet(rows).save(directory / SHEET_FILE, optimize=True)
    write_readme(directory)
    return metrics


def load(directory: Path) -> StableDiffusionPipeline:
    """The exported pipeline in float32, from files alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], card: dict[str, Any], stream: int
) -> torch.Tensor:
    """One picture a prompt with the recommended settings: uint8 (N, 3, 32, 32)."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        generator = torch.Generator().manual_seed(EVALUATION_SEED + start * 10 + stream)
        output = pipeline(
            prompts[start : start + BATCH],
            generator=generator,
            output_type="pt",
            **card["recommended"],
        )
        pictures.append((output.images * 255).round().to(torch.uint8))  # (B, 3, 32, 32)
    return torch.cat(pictures)


def shape_requests(count: int) -> torch.Tensor:
    """Shape, object colour and background colour, (N, 3) int64, all combinations alike often."""
    combinations = torch.tensor(
        [
            (shape, front, back)
            for shape in range(len(SHAPES))
            for front in range(len(COLOUR_NAMES))
            for back in range(len(COLOUR_NAMES))
            if front != back
        ]
    )  # (336, 3)
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    rounds = -(-count // len(combinations))
    orders = [torch.randperm(len(combinations), generator=generator) for _ in range(rounds)]
    return combinations[torch.cat(orders)[:count]]


def digit_metrics(pictures: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Agreement of ``pictures`` (N, 3, 32, 32) with the digits asked for, variety, nearness."""
    judge = fit_digit_judge()
    right = judge.digits(pictures) == wanted  # (N,)
    split = digit_split()
    train, test = digit_images(split.train), digit_images(split.test)
    made, real = digit_features(pictures), digit_features(train.images)  # (N, 64), (1297, 64)
    return {
        "digit_agreement": round(float(right.float().mean()), 4),
        "digit_judge_accuracy": round(judge.accuracy, 4),
        "digit_agreement_by_class": _by_class(right, wanted, [str(d) for d in range(10)]),
        # Below 1 the pictures of a class are more alike than real ones are.
        "digit_variety_ratio": round(
            _variety(made, wanted) / _variety(real, train.labels[:, 0]), 3
        ),
        # Far below 1 the pictures would be copies of training digits.
        "digit_nearest_training_ratio": round(
            _nearest(made, real) / _nearest(digit_features(test.images), real), 3
        ),
    }


def shape_metrics(pictures: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Agreement of ``pictures`` (N, 3, 32, 32) with ``wanted`` (N, 3), attribute by attribute."""
    judge = fit_shape_judge()
    right = judge.labels(pictures) == wanted  # (N, 3)
    shape, front, back = right.float().mean(0).tolist()
    accuracies = [round(value, 4) for value in judge.accuracies]
    return {
        "shape_agreement": round(shape, 4),
        "object_colour_agreement": round(front, 4),
        "background_colour_agreement": round(back, 4),
        "all_three_agreement": round(float(right.all(1).float().mean()), 4),
        "shape_judge_accuracies": accuracies,
        "shape_agreement_by_class": _by_class(right[:, 0], wanted[:, 0], list(SHAPES)),
        "object_colour_agreement_by_class": _by_class(
            right[:, 1], wanted[:, 1], list(COLOUR_NAMES)
        ),
    }


def contact_sheet(pictures: torch.Tensor, zoom: int = 2) -> Image.Image:
    """``pictures`` (N, 3, 32, 32) uint8 in rows of sixteen, enlarged without smoothing."""
    count = len(pictures) // SHEET_COLUMNS * SHEET_COLUMNS
    side = pictures.shape[-1]
    grid = pictures[:count].unflatten(0, (-1, SHEET_COLUMNS))  # (R, 16, 3, 32, 32)
    flat = grid.permute(0, 3, 1, 4, 2).reshape(-1, SHEET_COLUMNS * side, 3)  # (H, W, 3)
    sheet = Image.fromarray(np.ascontiguousarray(flat.numpy()))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def _shape_text(request: list[int]) -> str:
    shape, front, back = request
    return shape_caption(SHAPES[shape], COLOUR_NAMES[front], COLOUR_NAMES[back])


def _by_class(right: torch.Tensor, wanted: torch.Tensor, names: list[str]) -> dict[str, float]:
    present = [k for k in range(len(names)) if bool((wanted == k).any())]
    return {names[k]: round(float(right[wanted == k].float().mean()), 3) for k in present}


def _variety(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance between two pictures of one class."""
    distances = []
    for label in labels.unique():
        rows = features[labels == label]  # (M, 64)
        distances.append(torch.pdist(rows).mean() if len(rows) > 1 else torch.zeros(()))
    return float(torch.stack(distances).mean())


def _nearest(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Median distance to the nearest row of ``reference``."""
    return float(torch.cdist(features, reference).min(1).values.median())
