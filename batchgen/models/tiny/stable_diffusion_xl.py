"""Tiny Stable Diffusion XL models: base, turbo, refiner, inpainting and edits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny.parts import (
    HIDDEN,
    SIZE,
    autoencoder,
    clip_text_config,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    unet,
)

PROJECTION = 32  # width of the pooled embedding
TIME_WIDTH = 8  # width of the embedding of each size, crop or aesthetic score
FACTOR = 4


def build_base(folder: Path) -> Path:
    """A base model, which also does image-to-image and inpainting."""
    from diffusers import StableDiffusionXLPipeline

    with seeded():
        return _saved(StableDiffusionXLPipeline(**_parts(folder)), folder)


def build_turbo(folder: Path) -> Path:
    """A base model with the ancestral scheduler of SDXL Turbo, for one step."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

    with seeded():
        parts = _parts(folder)
        parts["scheduler"] = EulerAncestralDiscreteScheduler.from_config(
            parts["scheduler"].config, timestep_spacing="trailing"
        )
        return _saved(StableDiffusionXLPipeline(**parts), folder)


def build_refiner(folder: Path, seed: int = 8) -> Path:
    """A refiner: only the second text encoder, and an aesthetic score instead of a target size."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    with seeded(seed):
        pipeline = StableDiffusionXLImg2ImgPipeline(
            **_parts(folder, refiner=True),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
        )
        return _saved(pipeline, folder)


def build_ensemble(folder: Path) -> Path:
    """A base model and, in its subfolder ``refiner``, a refiner for it."""
    build_refiner(folder / "refiner")
    return build_base(folder)


def build_inpainting(folder: Path) -> Path:
    """A model whose U-Net reads the mask and the masked image in addition to the latents."""
    from diffusers import StableDiffusionXLInpaintPipeline

    with seeded():
        return _saved(StableDiffusionXLInpaintPipeline(**_parts(folder, in_channels=9)), folder)


def build_edit(folder: Path) -> Path:
    """A model whose U-Net reads the image in addition to the latents, like InstructPix2Pix."""
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    with seeded():
        pipeline = StableDiffusionXLInstructPix2PixPipeline(**_parts(folder, in_channels=8))
        return _saved(pipeline, folder)


def _parts(folder: Path, in_channels: int = 4, refiner: bool = False) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextModelWithProjection

    first = None if refiner else clip_tokenizer(folder / "tokenizer")
    second = clip_tokenizer(folder / "tokenizer_2")
    sizes = 5 if refiner else 6  # numbers that condition the U-Net, next to the pooled embedding
    return {
        "tokenizer": first,
        "text_encoder": first and clip_text_encoder(first),
        "tokenizer_2": second,
        "text_encoder_2": CLIPTextModelWithProjection(
            clip_text_config(second, projection_dim=PROJECTION, hidden_act="gelu")
        ),
        "unet": unet(
            SIZE // FACTOR,
            in_channels,
            cross_attention_dim=HIDDEN if refiner else 2 * HIDDEN,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            projection_class_embeddings_input_dim=sizes * TIME_WIDTH + PROJECTION,
            use_linear_projection=True,
        ),
        "vae": autoencoder(FACTOR, scaling_factor=0.13025),
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
    }


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("text-to-image", "stable-diffusion-xl"): build_base,
    ("text-to-image", "stable-diffusion-xl-refiner"): build_ensemble,
    ("image-to-image", "stable-diffusion-xl"): build_base,
    ("inpainting", "stable-diffusion-xl"): build_inpainting,
    ("image-edit", "stable-diffusion-xl"): build_edit,
}
