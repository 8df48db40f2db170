"""Tiny models of the task ``variation``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.replicas.tiny.parts import (
    HIDDEN,
    SIZE,
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    unet,
)


def clip_image_encoder(**changes: Any) -> Any:
    """A CLIP image encoder of two layers for 32 x 32 pixels; its embeddings are 32 wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "projection_dim": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**fields, **changes}))


def clip_feature_extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)


def build_image_variation(folder: Path) -> Path:
    """Stable Diffusion that attends to one CLIP image embedding."""
    from diffusers import PNDMScheduler, StableDiffusionImageVariationPipeline

    with seeded():
        pipeline = StableDiffusionImageVariationPipeline(
            vae=autoencoder(),
            image_encoder=clip_image_encoder(),
            unet=unet(SIZE // 4, 4),
            scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=clip_feature_extractor(),
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_unclip(folder: Path) -> Path:
    """Stable unCLIP: the image embedding, with noise and its level, is the U-Net's class."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    with seeded():
        tokenizer = clip_tokenizer(folder / "tokenizer")
        classes = {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * HIDDEN,  # embedding and noise level
        }
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=clip_feature_extractor(),
            image_encoder=clip_image_encoder(),
            image_normalizer=StableUnCLIPImageNormalizer(HIDDEN),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=clip_text_encoder(tokenizer),
            unet=unet(SIZE // 4, 4, **classes),
            scheduler=DDIMScheduler(steps_offset=1, set_alpha_to_one=False),
            vae=autoencoder(),
        )
    pipeline.save_pretrained(folder)
    return folder


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("variation", "image-variation"): build_image_variation,
    ("variation", "unclip"): build_unclip,
}
