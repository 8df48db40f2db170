"""Tiny models of the task ``variation``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny import stable_diffusion_xl
from batchgen.models.tiny.parts import (
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
    """Stable Diffusion with cross-attention to one CLIP image embedding."""
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
        classes: dict[str, Any] = {
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


def build_ip_adapter(folder: Path) -> Path:
    """Stable Diffusion, with an IP-Adapter and its image encoder in the folder ``ip_adapter``."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with seeded():
        tokenizer = clip_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet(SIZE // 4, 4),
            scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=clip_feature_extractor(),
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        save_ip_adapter(pipeline.unet, folder / "ip_adapter", "ip-adapter_sd15.safetensors")
    return folder


def build_ip_adapter_xl(folder: Path) -> Path:
    """Stable Diffusion XL, with an IP-Adapter and its image encoder in ``ip_adapter``."""
    from diffusers import UNet2DConditionModel

    stable_diffusion_xl.build_base(folder)
    with seeded():
        denoiser = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        save_ip_adapter(denoiser, folder / "ip_adapter", "ip-adapter_sdxl.safetensors")
    return folder


def save_ip_adapter(denoiser: Any, folder: Path, name: str, plus: bool = False) -> None:
    """An IP-Adapter in the layout of published ones: its weights, and ``image_encoder``.

    ``plus``: it reads the image encoder's hidden states, like IP-Adapter Plus.
    """
    from safetensors.torch import save_file

    clip_image_encoder().save_pretrained(folder / "image_encoder")
    width = denoiser.config.cross_attention_dim
    shapes = _plus_projection(width) if plus else _projection(width)
    layers = [name for name in denoiser.attn_processors if name.endswith("attn2.processor")]
    for number, layer in enumerate(layers):
        inside = denoiser.get_submodule(layer.removesuffix(".processor")).inner_dim
        # numbered among all attention layers; every other one is cross-attention to the prompt
        shapes[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"] = (inside, width)
        shapes[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] = (inside, width)
    save_file({name: _drawn(name, shape) for name, shape in shapes.items()}, folder / name)


def _projection(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that project one image embedding to four tokens."""
    return {
        "image_proj.proj.weight": (4 * width, HIDDEN),
        "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }


def _plus_projection(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a resampler of hidden states to four tokens: four layers with one head of 64."""
    head = 64
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 4, head),
        "proj_in.weight": (head, HIDDEN),
        "proj_in.bias": (head,),
        "proj_out.weight": (width, head),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for layer in ("layers.0", "layers.1", "layers.2", "layers.3"):
        shapes |= {f"{layer}.0.to_q.weight": (head, head), f"{layer}.0.to_out.weight": (head, head)}
        shapes |= {f"{layer}.0.to_kv.weight": (2 * head, head)}
        shapes |= {f"{layer}.1.1.weight": (4 * head, head), f"{layer}.1.3.weight": (head, 4 * head)}
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.weight": (head,), f"{layer}.{norm}.bias": (head,)}
    return {f"image_proj.{name}": shape for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...]) -> Any:
    """Random weights, so large that the image has a visible effect."""
    import torch

    scale = 1.0 if name.endswith("_ip.weight") else 0.2
    return scale * torch.randn(shape)


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("variation", "image-variation"): build_image_variation,
    ("variation", "unclip"): build_unclip,
    ("variation", "ip-adapter"): build_ip_adapter,
    ("variation", "ip-adapter-xl"): build_ip_adapter_xl,
}
