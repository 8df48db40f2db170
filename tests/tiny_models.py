"""A tiny Stable Diffusion in the forms that tests need: scale factors, precisions, variants."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from batchgen.models.libraries import quiet_libraries
from batchgen.models.tiny.parts import (
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    unet,
)

quiet_libraries()


def build_model(
    folder: Path,
    *,
    factor: int = 4,
    channels: int = 4,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Path:
    """Save a tiny Stable Diffusion of 32 x 32 pixels and return its folder."""
    with seeded():
        tokenizer = clip_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(factor, channels),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet(32 // factor, channels, channels),
            scheduler=PNDMScheduler(
                skip_prk_steps=True, beta_schedule="scaled_linear", steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.to(dtype).save_pretrained(folder, variant=variant)
    return folder
