"""Composes a tiny model's stages, and runs the plain pipelines whose pixels they must equal."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from batchgen import models
from batchgen.records import (
    Call,
    ConditionBatch,
    ImageBatch,
    Sample,
    derive_seed,
)
from batchgen.spec.build import build
from batchgen.stages.decode import Decoder
from batchgen.stages.denoise import Denoiser
from batchgen.stages.encode import Encoder, sample_generator

TASKS = ("text-to-image", "image-to-image")
PLAIN = {
    "text-to-image": diffusers.StableDiffusionPipeline,
    "image-to-image": diffusers.StableDiffusionImg2ImgPipeline,
}
PROMPTS = ("a red star", "a blue circle", "a red star", "seven")
B = 3


class Stages:
    """The three stages of one model, composed as an actor of the fused layout does."""

    def __init__(self, folder: Path, task: str, batch_size: int = B, **model: Any) -> None:
        columns = {"image": "image"} if task == "image-to-image" else {}
        self.spec = build(
            {
                "input": {"path": "in.parquet", "columns": columns},
                "output": {"url": "out"},
                "task": task,
                "model": {"path": str(folder), "dtype": "float32", **model},
                "resources": {"batch_size": batch_size},
            }
        )
        self.info = models.inspect(self.spec.model, task)
        self.encode: Encoder = models.load_encoder(self.info, self.spec)
        self.denoise: Denoiser = models.load_denoiser(self.info, self.spec)
        self.decode: Decoder = models.load_decoder(self.info, self.spec)

    def __call__(self, batch: ConditionBatch) -> ImageBatch:
        return self.decode(self.denoise(self.encode(batch)))


@cache
def stages(folder: Path, task: str, scheduler: str | None = None) -> Stages:
    return Stages(folder, task, scheduler=scheduler)


@cache
def plain(folder: Path, task: str, scheduler: str | None = None) -> Any:
    """What a user of diffusers would write."""
    pipeline = PLAIN[task].from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    if scheduler is not None:
        wanted = getattr(diffusers, scheduler)
        pipeline.scheduler = wanted.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(number: int, width: int = 32, height: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch_of(task: str, rows: list[int], *, negative: str = "grey", **call: Any) -> ConditionBatch:
    """Samples that depend on their row number alone."""
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    settings |= {"strength": 0.6 if task == "image-to-image" else None, "width": 32, "height": 32}
    shared = Call(**(settings | call))
    samples = tuple(
        Sample(
            key=f"row{row}",
            source_id=str(row),
            row=row,
            variant=0,
            seed=derive_seed(5, f"row{row}"),
            prompt=PROMPTS[row % len(PROMPTS)],
            negative_prompt=negative,
            call=shared,
        )
        for row in rows
    )
    pictured = task == "image-to-image"
    pictures = tuple(image(row, shared.width, shared.height) for row in rows)
    return ConditionBatch(samples, {"image": pictures} if pictured else {})


def plain_pixels(pipeline: Any, batch: ConditionBatch, *, from_embeds: bool) -> Any:
    """uint8 (n, H, W, 3) of the plain pipeline, from strings or from prompts encoded one by one."""
    prompts = [sample.prompt for sample in batch.samples]
    negatives = [sample.negative_prompt for sample in batch.samples]
    guided = batch.call.guidance_scale > 1
    arguments: dict[str, Any] = {"prompt": prompts, "negative_prompt": negatives}
    if from_embeds:
        pairs = [
            pipeline.encode_prompt(prompt, "cpu", 1, guided, negative)
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
        arguments = {"prompt_embeds": torch.cat([positive for positive, _ in pairs])}
        if guided:
            arguments["negative_prompt_embeds"] = torch.cat([negative for _, negative in pairs])
    if not batch.images:
        arguments |= {"width": batch.call.width, "height": batch.call.height}
    else:
        arguments["image"] = VaeImageProcessor.numpy_to_pil(np.stack(batch.images["image"]) / 255.0)
        arguments["strength"] = batch.call.strength
    images = pipeline(
        **arguments,
        num_inference_steps=batch.call.num_inference_steps,
        guidance_scale=batch.call.guidance_scale,
        generator=[sample_generator(sample) for sample in batch.samples],
    ).images
    return np.stack([np.asarray(picture) for picture in images])


def furthest(left: Any, right: Any) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())
