"""What the stages share that train one more part for a finished model, whose weights stay."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, StableDiffusionPipeline

from jobs.small_model.card import CARD_FILE, read_card, write_readme
from jobs.small_model.data import (
    LabelledImages,
    augmented_digits,
    digit_images,
    digit_split,
    drawn_shapes,
)
from jobs.small_model.denoiser import LatentPool
from jobs.small_model.loop import StageResult
from jobs.small_model.recipe import AddedRecipe
from jobs.small_model.vae import encode_all


@dataclass(frozen=True)
class Batch:
    """Rows of the digits' pool and of the shapes' pool that a step draws: (B_d,), (B_s,) int64."""

    digits: torch.Tensor
    shapes: torch.Tensor


def load_frozen(model: Path) -> StableDiffusionPipeline:
    """The finished model in float32; no weight of it is trained."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        model, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)
    return pipeline


def images_for(recipe: AddedRecipe) -> tuple[LabelledImages, LabelledImages]:
    """Digits and shapes as the model was trained on, fewer of them."""
    source = digit_images(digit_split().train[: recipe.digit_pool])
    digits = augmented_digits(source, recipe.digit_copies, recipe.seed + 2)
    return digits, drawn_shapes(recipe.shape_pool, recipe.seed + 3)


def pool_of(pipeline: StableDiffusionPipeline, images: LabelledImages) -> LatentPool:
    """The images as the model's own latents, with their labels."""
    return LatentPool(encode_all(pipeline.vae, images.images), images.labels)


def draw_batch(
    digits: LatentPool, shapes: LatentPool, recipe: AddedRecipe, generator: torch.Generator
) -> Batch:
    """Rows of both pools, in the recipe's proportion."""
    count = recipe.stage.batch_size
    digit_count = round(count * recipe.digit_share)
    i = torch.randint(len(digits.labels), (digit_count,), generator=generator)  # (B_d,)
    j = torch.randint(len(shapes.labels), (count - digit_count,), generator=generator)  # (B_s,)
    return Batch(i, j)


def training_figures(recipe: AddedRecipe, done: StageResult) -> dict[str, Any]:
    """How the part was trained, for the card."""
    return {
        "steps": done.steps_done,
        "cpu_s": round(done.cpu_s),
        "torch": torch.__version__,
        "recipe": asdict(recipe),
    }


def save_part(part: ModelMixin, folder: Path) -> None:
    """``config.json`` and float16 safetensors; the part in memory stays float32."""
    halved = copy.deepcopy(part).half()
    halved.save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)


def write_added(model: Path, name: str, figures: dict[str, Any]) -> None:
    """Put the figures of one part into the model's card."""
    card = read_card(model)
    card["added"] = {**card.get("added", {}), name: figures}
    (model / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    write_readme(model)
