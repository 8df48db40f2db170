"""Computes a model's pixels, so that tests can compare different locations of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.family_stages import Array, FamilyStages, batch, call, mask, picture
from tests.model_folders import IMAGE, TEXT

PICTURES = {
    "image": [picture(number) for number in range(3)],
    "mask": [mask(number) for number in range(3)],
}
PARTS = {TEXT: (), IMAGE: ("image",), "inpainting": ("image", "mask")}


def pixels(folder: Path | str, task: str = TEXT, **model: Any) -> Array:
    """Of three samples."""
    stages = aligned(FamilyStages(Path(folder), task, **model))
    shared = call(strength=None if task == TEXT else 0.7)
    images = {part: PICTURES[part] for part in PARTS[task]}
    return stages.fused(batch([0, 1, 2], shared, images)).pixels


def aligned(stages: FamilyStages) -> FamilyStages:
    """Weights at addresses as torch gives them.

    In a mapped file they may stand at any; how a CPU rounds the product of a matrix and a vector
    depends on that, by one in the last place.
    """
    for stage in (stages.encode, stages.denoise, stages.decode):
        for part in stage.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():
                    parameter.data = parameter.data.clone()
    return stages
