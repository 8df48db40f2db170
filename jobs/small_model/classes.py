"""The table of classes: one learned token a class, in the place of a caption."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import nn

from batchgen.models.own import ClassEmbedder
from jobs.small_model.added import (
    draw_batch,
    images_for,
    load_frozen,
    pool_of,
    save_part,
    training_figures,
    write_added,
)
from jobs.small_model.captions import DIGIT_WORDS, digit_caption, shape_caption
from jobs.small_model.card import read_card
from jobs.small_model.data import COLOUR_NAMES, SHAPES
from jobs.small_model.denoiser import LatentPool, noise_schedule, tokenize, velocity_loss
from jobs.small_model.evaluate import BATCH, EVALUATION_SEED
from jobs.small_model.judges import fit_digit_judge, fit_shape_judge
from jobs.small_model.loop import StageResult, run_stage, step_generator
from jobs.small_model.recipe import AddedRecipe

CLASSES: Final = (*DIGIT_WORDS, *SHAPES)
NO_CLASS: Final = len(CLASSES)
CLASSES_FILE: Final = "classes.pt"
GUIDANCE_SCALES: Final = (1.0, 2.0, 3.0)
BAR: Final = 0.8  # share of pictures of the class asked for


def train_classes(
    model: Path, out: Path, recipe: AddedRecipe, stop_at: int | None = None
) -> StageResult:
    """Train the table for ``model``, going on from the checkpoint in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline = load_frozen(model)
    digits, shapes = (pool_of(pipeline, images) for images in images_for(recipe))
    table = first_table(pipeline)
    loss = partial(class_loss, table, pipeline.unet, noise_schedule(), digits, shapes, recipe)
    return run_stage("classes", table, loss, recipe.stage, out / CLASSES_FILE, stop_at)


@torch.no_grad()
def first_table(pipeline: StableDiffusionPipeline) -> ClassEmbedder:
    """Each row is the mean of what the text encoder makes of captions of its class."""
    captions = [[digit_caption(digit)] for digit in range(10)]
    captions += [
        [
            shape_caption(shape, front, back)
            for front in COLOUR_NAMES
            for back in COLOUR_NAMES
            if front != back
        ]
        for shape in SHAPES
    ]
    captions.append([""])
    labels = {str(number): name for number, name in enumerate(CLASSES)}
    table = ClassEmbedder(len(CLASSES), pipeline.text_encoder.config.hidden_size, labels)
    for row, texts in enumerate(captions):
        tokens = tokenize(pipeline.tokenizer, texts)  # (N, L)
        states = pipeline.text_encoder(tokens).last_hidden_state  # (N, L, D)
        table.embedding.weight[row] = states.mean(dim=(0, 1))
    return table


def class_loss(
    table: ClassEmbedder,
    unet: nn.Module,
    schedule: DDPMScheduler,
    digits: LatentPool,
    shapes: LatentPool,
    recipe: AddedRecipe,
    step: int,
) -> torch.Tensor:
    """The diffusion loss of one batch, each picture given its class or none."""
    generator = step_generator(recipe.seed + 6, step)
    batch = draw_batch(digits, shapes, recipe, generator)
    z = torch.cat((digits.latents[batch.digits], shapes.latents[batch.shapes]))  # (B, 4, 8, 8)
    numbers = torch.cat(
        (digits.labels[batch.digits, 0], shapes.labels[batch.shapes, 0] + len(DIGIT_WORDS))
    )  # (B,)
    dropped = torch.rand(len(z), generator=generator) < recipe.dropout  # (B,)
    numbers = numbers.where(~dropped, torch.tensor(NO_CLASS))
    tokens = table.embedding(numbers)[:, None]  # (B, 1, D)
    return velocity_loss(lambda x, t: unet(x, t, tokens).sample, schedule, z, generator)


def add_classes(
    model: Path, table: ClassEmbedder, recipe: AddedRecipe, done: StageResult, images: int
) -> dict[str, Any]:
    """Measure the table and, if it meets its bar, put it and its figures into ``model``.

    Raises:
        ValueError: it does not; ``model`` is as it was.
    """
    pipeline = load_frozen(model)
    found = class_metrics(pipeline, table.half().float(), images, read_card(model))
    if found["class_agreement"] < BAR:
        raise ValueError(f"the class is right in {found['class_agreement']}, bar {BAR}")
    save_part(table, model / "class_embedder")
    path = model / "model_index.json"
    index = {**json.loads(path.read_text()), "class_embedder": ["batchgen", "ClassEmbedder"]}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_added(model, "classes", {"training": training_figures(recipe, done), "metrics": found})
    return found


def class_metrics(
    pipeline: StableDiffusionPipeline, table: ClassEmbedder, images: int, card: dict[str, Any]
) -> dict[str, Any]:
    """How often the judges see the class asked for; ``images`` pictures, classes in turn."""
    numbers = torch.arange(images) % len(CLASSES)  # (N,)
    of_shape = numbers >= len(DIGIT_WORDS)  # (N,)
    digit_judge, shape_judge = fit_digit_judge(), fit_shape_judge()
    by_guidance = {}
    for guidance in GUIDANCE_SCALES:
        settings = {**card["recommended"], "guidance_scale": guidance}
        pictures = paint_classes(pipeline, table, numbers, settings)
        judged = shape_judge.labels(pictures[of_shape])  # (M, 3)
        right = torch.empty_like(of_shape)
        right[~of_shape] = digit_judge.digits(pictures[~of_shape]) == numbers[~of_shape]
        right[of_shape] = judged[:, 0] + len(DIGIT_WORDS) == numbers[of_shape]
        by_guidance[str(guidance)] = _share(right)
    return {  # of the last guidance, which is the one to recommend
        "images": images,
        "guidance_scale": guidance,
        "class_agreement": _share(right),
        "digit_agreement": _share(right[~of_shape]),
        "shape_agreement": _share(right[of_shape]),
        "class_agreement_by_guidance": by_guidance,
        "agreement_by_class": {
            name: _share(right[numbers == number]) for number, name in enumerate(CLASSES)
        },
        "colour_pairs_seen": len({(front, back) for _, front, back in judged.tolist()}),
    }


def _share(right: torch.Tensor) -> float:
    return round(float(right.float().mean()), 4)


@torch.no_grad()
def paint_classes(
    pipeline: StableDiffusionPipeline,
    table: ClassEmbedder,
    numbers: torch.Tensor,
    settings: dict[str, Any],
) -> torch.Tensor:
    """One picture for each of the class ``numbers`` (N,): uint8 (N, 3, 32, 32)."""
    pictures = []
    for start, rows in enumerate(numbers.split(BATCH)):
        output = pipeline(
            prompt_embeds=table.embedding(rows)[:, None],  # (B, 1, D)
            negative_prompt_embeds=table(None).expand(len(rows), -1, -1),
            generator=torch.Generator().manual_seed(EVALUATION_SEED + start),
            output_type="pt",
            **settings,
        )
        pictures.append((output.images * 255).round().to(torch.uint8))  # (B, 3, 32, 32)
    return torch.cat(pictures)
