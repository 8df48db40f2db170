"""The ControlNet of Canny edges: a copy of the U-Net's first half that reads them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch.nn import functional

from batchgen.images.conditions import make_condition
from jobs.small_model.added import (
    draw_batch,
    images_for,
    load_frozen,
    pool_of,
    save_part,
    training_figures,
    write_added,
)
from jobs.small_model.captions import (
    digit_caption,
    digit_captions,
    shape_caption,
    shape_captions,
)
from jobs.small_model.card import read_card
from jobs.small_model.data import COLOUR_NAMES, SHAPES, digit_images, digit_split, drawn_shapes
from jobs.small_model.denoiser import LatentPool, noise_schedule, tokenize, velocity_loss
from jobs.small_model.evaluate import BATCH, EVALUATION_SEED, shape_requests
from jobs.small_model.judges import fit_digit_judge, fit_shape_judge
from jobs.small_model.loop import StageResult, run_stage, step_generator
from jobs.small_model.recipe import AddedRecipe

CONTROL_FILE: Final = "control.pt"
# Three widths, two halvings between them: 32 pixels a side become 8, as the VAE makes them.
EDGE_WIDTHS: Final = (16, 32, 64)
HELD_OUT_SEED: Final = 4_000
BARS: Final = {"shape_edges_f1": 0.8, "background_colour_agreement": 0.9}


def train_control(
    model: Path, out: Path, recipe: AddedRecipe, stop_at: int | None = None
) -> StageResult:
    """Train the ControlNet for ``model``, going on from the checkpoint in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline = load_frozen(model)
    images = images_for(recipe)
    edges = torch.cat([edges_of(part.images) for part in images])  # (N, 32, 32)
    digits, shapes = (pool_of(pipeline, part) for part in images)
    net = first_control(pipeline, recipe.seed)
    loss = partial(control_loss, net, pipeline, noise_schedule(), digits, shapes, edges, recipe)
    return run_stage("control", net, loss, recipe.stage, out / CONTROL_FILE, stop_at)


def first_control(pipeline: StableDiffusionPipeline, seed: int) -> ControlNetModel:
    """The U-Net's own weights behind a new reader of edges; as yet it changes nothing."""
    torch.manual_seed(seed + 7)
    net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=EDGE_WIDTHS)
    return net.train().requires_grad_(True)


def edges_of(images: torch.Tensor) -> torch.Tensor:
    """Where Canny's detector sees edges in ``images`` (N, 3, H, W) uint8: (N, H, W) bool."""
    found = [
        np.asarray(make_condition("canny", {}, Image.fromarray(picture)))[:, :, 0] > 0
        for picture in images.permute(0, 2, 3, 1).contiguous().numpy()
    ]
    return torch.from_numpy(np.stack(found))


def as_control(edges: torch.Tensor) -> torch.Tensor:
    """Edges (N, H, W) bool as a ControlNet reads them: float32 (N, 3, H, W) in 0..1."""
    return edges[:, None].float().expand(-1, 3, -1, -1)


def control_loss(
    net: ControlNetModel,
    pipeline: StableDiffusionPipeline,
    schedule: DDPMScheduler,
    digits: LatentPool,
    shapes: LatentPool,
    edges: torch.Tensor,
    recipe: AddedRecipe,
    step: int,
) -> torch.Tensor:
    """The diffusion loss of one batch, each picture given its caption and its edges."""
    generator = step_generator(recipe.seed + 8, step)
    batch = draw_batch(digits, shapes, recipe, generator)
    z = torch.cat((digits.latents[batch.digits], shapes.latents[batch.shapes]))  # (B, 4, 8, 8)
    rows = torch.cat((batch.digits, batch.shapes + len(digits.labels)))  # (B,)
    control = as_control(edges[rows])  # (B, 3, 32, 32)
    captions = digit_captions(digits.labels[batch.digits], generator)
    captions += shape_captions(shapes.labels[batch.shapes], generator)
    dropped = torch.rand(len(z), generator=generator) < recipe.dropout  # (B,)
    captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
    with torch.no_grad():
        states = pipeline.text_encoder(tokenize(pipeline.tokenizer, captions)).last_hidden_state

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        down, middle = net(noisy, t, states, control, return_dict=False)
        velocity: torch.Tensor = pipeline.unet(
            noisy,
            t,
            states,  # (B, L, D)
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return velocity

    return velocity_loss(predict, schedule, z, generator)


def add_control(
    model: Path, net: ControlNetModel, recipe: AddedRecipe, done: StageResult, images: int
) -> dict[str, Any]:
    """Measure the ControlNet and, if it meets its bars, put it beside ``model``.

    Raises:
        ValueError: it does not; nothing is written.
    """
    found = control_metrics(load_frozen(model), net.half().float(), images, read_card(model))
    if not all(found[name] >= bar for name, bar in BARS.items()):
        raise ValueError(f"{found} does not meet {BARS}")
    save_part(net, model.parent / f"{model.name}-canny")
    write_added(model, "control", {"training": training_figures(recipe, done), "metrics": found})
    return found


def control_metrics(
    pipeline: StableDiffusionPipeline, net: ControlNetModel, images: int, card: dict[str, Any]
) -> dict[str, Any]:
    """Whether pictures have the edges given, and the colours and shape asked for.

    The edges are of drawings and digits never trained on. A drawing's caption keeps its shape and
    asks for other colours.
    """
    drawn, real = drawn_shapes(images, HELD_OUT_SEED), digit_images(digit_split().test)
    requests = torch.cat((drawn.labels[:, :1], shape_requests(images)[:, 1:]), 1)  # (N, 3)
    captions = [
        shape_caption(SHAPES[shape], COLOUR_NAMES[front], COLOUR_NAMES[back])
        for shape, front, back in requests.tolist()
    ]
    digits = real.labels[:images, 0].tolist()
    shape_edges, digit_edges = edges_of(drawn.images), edges_of(real.images[:images])
    settings = card["recommended"]
    free = paint(pipeline, None, captions, shape_edges, settings)
    held = paint(pipeline, net, captions, shape_edges, settings)
    names = [digit_caption(digit) for digit in digits]
    free_digits = paint(pipeline, None, names, digit_edges, settings)
    held_digits = paint(pipeline, net, names, digit_edges, settings)
    right = (fit_shape_judge().labels(held) == requests).float().mean(0).tolist()  # (3,)
    kept = fit_digit_judge().digits(held_digits) == torch.tensor(digits)
    found = {
        "shape_edges_f1": agreement(edges_of(held), shape_edges),
        "shape_edges_f1_without": agreement(edges_of(free), shape_edges),
        "digit_edges_f1": agreement(edges_of(held_digits), digit_edges),
        "digit_edges_f1_without": agreement(edges_of(free_digits), digit_edges),
        "shape_agreement": right[0],
        "object_colour_agreement": right[1],
        "background_colour_agreement": right[2],
        "digit_agreement": float(kept.float().mean()),
    }
    return {"images": images, **{name: round(value, 4) for name, value in found.items()}}


@torch.no_grad()
def paint(
    pipeline: StableDiffusionPipeline,
    net: ControlNetModel | None,
    captions: list[str],
    edges: torch.Tensor,
    settings: dict[str, Any],
) -> torch.Tensor:
    """One picture a caption, by ``edges`` (N, H, W) if there is a net: uint8 (N, 3, H, W)."""
    parts = pipeline.components
    if net is not None:
        controlled = StableDiffusionControlNetPipeline(
            **parts, controlnet=net.eval(), requires_safety_checker=False
        )
        controlled.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), BATCH):
        some = captions[start : start + BATCH]
        generator = torch.Generator().manual_seed(EVALUATION_SEED + start)
        common = {"generator": generator, "output_type": "pt", **settings}
        if net is None:
            made = pipeline(some, **common).images
        else:
            made = controlled(some, image=as_control(edges[start : start + BATCH]), **common).images
        pictures.append((made * 255).round().to(torch.uint8))  # (B, 3, H, W)
    return torch.cat(pictures)


def agreement(made: torch.Tensor, given: torch.Tensor) -> float:
    """Mean F1 of edges (N, H, W) bool, each allowed to be a pixel off; 0 where there are none."""
    near_made, near_given = _widened(made), _widened(given)
    precision = (made & near_given).sum((1, 2)) / made.sum((1, 2)).clamp_min(1)  # (N,)
    recall = (given & near_made).sum((1, 2)) / given.sum((1, 2)).clamp_min(1)  # (N,)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    return float(f1[given.any(2).any(1)].mean())


def _widened(edges: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(edges[:, None].float(), 3, 1, 1)[:, 0] > 0
