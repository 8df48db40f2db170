"""The training run from first image to last step, in one place, read top to bottom."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from jobs.small_model.data import (
    LabelledImages,
    augmented_digits,
    digit_images,
    digit_split,
    drawn_shapes,
)
from jobs.small_model.denoiser import LatentPool, build_denoiser, denoiser_loss, noise_schedule
from jobs.small_model.loop import run_stage
from jobs.small_model.recipe import Recipe
from jobs.small_model.tokenizer import build_tokenizer
from jobs.small_model.vae import build_vae, encode_all, normalise_latents, vae_loss

RECIPE_FILE = "recipe.json"
VAE_FILE = "vae.pt"
DENOISER_FILE = "denoiser.pt"


def train(out: Path, recipe: Recipe, stop_at: int | None = None) -> bool:
    """Train both stages into ``out``, going on from its checkpoints; True once all is done.

    ``stop_at`` counts steps from the beginning of the run, the VAE's first; the call ends there
    with its checkpoint written, and the next call goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, recipe)
    digits, shapes = training_images(recipe)
    vae = build_vae(recipe)
    loss = partial(vae_loss, vae, digits, shapes, recipe)
    first = run_stage("vae", vae, loss, recipe.vae, out / VAE_FILE, stop_at)
    if not first.done:
        return False
    vae.load_state_dict(first.averaged.state_dict())
    normalise_latents(vae.eval().requires_grad_(False), normalising_images(digits, shapes))
    digit_pool = LatentPool(encode_all(vae, digits.images), digits.labels)
    shape_pool = LatentPool(encode_all(vae, shapes.images), shapes.labels)
    tokenizer = build_tokenizer()
    model = build_denoiser(recipe, tokenizer)
    loss = partial(
        denoiser_loss, model, tokenizer, noise_schedule(), digit_pool, shape_pool, recipe
    )
    left = None if stop_at is None else stop_at - first.steps_done
    second = run_stage("denoiser", model, loss, recipe.denoiser, out / DENOISER_FILE, left)
    return second.done


def training_images(recipe: Recipe) -> tuple[LabelledImages, LabelledImages]:
    """The digits of the training split with their moved copies, and the drawn shapes."""
    source = digit_images(digit_split().train)
    digits = augmented_digits(source, recipe.digit_copies, recipe.seed + 2)
    return digits, drawn_shapes(recipe.shape_pool, recipe.seed + 3)


def normalising_images(digits: LabelledImages, shapes: LabelledImages) -> torch.Tensor:
    """A sample of both sorts, uint8 (N, 3, 32, 32), in the proportion training draws them."""
    return torch.cat((digits.images[:1_024], shapes.images[:3_072]))


def read_recipe(out: Path) -> Recipe:
    """The recipe of the run in ``out``."""
    return Recipe.from_dict(json.loads((out / RECIPE_FILE).read_text()))


def _claim(out: Path, recipe: Recipe) -> None:
    """Write the recipe into ``out``, or make sure that the one there is this one."""
    path = out / RECIPE_FILE
    if not path.exists():
        path.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")
    elif json.loads(path.read_text()) != recipe.to_dict():
        raise ValueError(f"{path} is another recipe; give a new --out or the same settings")
