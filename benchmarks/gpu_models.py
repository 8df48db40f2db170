"""Models of the true sizes with random weights: Stable Diffusion 1.5, SDXL, Flux.1 dev.

The configurations are those of the published models. Tokenizers have one token for each letter,
since the published vocabularies are files. Weights are normal with deviation 1 / sqrt(fan-in), so
that activations stay finite; images are noise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny import transformer_text
from batchgen.models.tiny.parts import autoencoder, clip_text_config, clip_tokenizer, unet

SDXL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": SDXL_BLOCKS,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY_SDXL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VAES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "flux": {
        "sample_size": 1024,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "max_position_embeddings": 77, "vocab_size": 49408}
BIG_G: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
}
BIG_G |= {"num_attention_heads": 20, "max_position_embeddings": 77, "vocab_size": 49408}
T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
T5_XXL |= {"num_heads": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
TINY_FLUX |= {"num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}


def random(make: Callable[[], Any], device: str, dtype: Any, seed: int = 3) -> Any:
    """The module that ``make`` builds, with random weights drawn on the device."""
    import torch

    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in module.named_parameters():
        if tensor.ndim >= 2:
            fan_in = tensor.numel() // tensor.shape[0]
            tensor.data.normal_(0.0, fan_in**-0.5, generator=generator)
        else:  # norms have weight one and bias zero, other biases are zero
            tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"{type(module).__name__}: unknown buffer {name}")
        buffer.copy_(torch.arange(buffer.shape[-1], device=device))
    return module


def clip(folder: Path, name: str, size: dict[str, Any], small: bool) -> tuple[Any, Any]:
    """A tokenizer, and the configuration of its text encoder."""
    tokenizer = clip_tokenizer(folder / name)
    if not small:
        tokenizer.model_max_length = 77
    return tokenizer, clip_text_config(tokenizer, **({} if small else size))


def vae(model: str, small: bool, device: str, dtype: Any) -> Any:
    changes = VAES[model]
    if not small:
        return random(
            lambda: autoencoder(8, **{**VAE, "norm_num_groups": 32, **changes}), device, dtype
        )
    changes = {**changes, "sample_size": 32}
    channels = changes.pop("latent_channels", 4)
    return random(lambda: autoencoder(4, channels, **changes), device, dtype)


def build(model: str, folder: Path, small: bool, device: str, dtype: Any) -> Path:
    """Save ``sd15`` or ``sdxl`` in a folder, once; sections share it."""
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = (_sd15 if model == "sd15" else _sdxl)(part, small, device, dtype)
    pipeline.save_pretrained(part)
    part.rename(folder)
    return folder


def _denoiser(model: str, small: bool, device: str, dtype: Any) -> Any:
    if small:
        return random(lambda: unet(8, 4, **(TINY_SDXL if model == "sdxl" else {})), device, dtype)
    size = {**UNETS[model], "in_channels": 4, "norm_num_groups": 32}
    return random(lambda: unet(**size), device, dtype)


def _sd15(folder: Path, small: bool, device: str, dtype: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer, config = clip(folder, "tokenizer", CLIP_L, small)
    return StableDiffusionPipeline(
        vae=vae("sd15", small, device, dtype),
        text_encoder=random(lambda: CLIPTextModel(config), device, dtype),
        tokenizer=tokenizer,
        unet=_denoiser("sd15", small, device, dtype),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path, small: bool, device: str, dtype: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, config = clip(folder, "tokenizer", CLIP_L, small)
    second, wide = clip(folder, "tokenizer_2", BIG_G, small)
    wide.projection_dim = 32 if small else 1280
    return StableDiffusionXLPipeline(
        vae=vae("sdxl", small, device, dtype),
        text_encoder=random(lambda: CLIPTextModel(config), device, dtype),
        tokenizer=first,
        text_encoder_2=random(lambda: CLIPTextModelWithProjection(wide), device, dtype),
        tokenizer_2=second,
        unet=_denoiser("sdxl", small, device, dtype),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def flux(folder: Path, small: bool, device: str, dtype: Any) -> Any:
    """A complete Flux pipeline on the device; it is too large to be saved and loaded here."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, config = clip(folder, "tokenizer", CLIP_L, small)
    letters = transformer_text.t5_tokenizer()
    size = {**FLUX, **(TINY_FLUX | {"axes_dims_rope": (4, 2, 2)} if small else {})}
    text = T5Config(**T5_XXL)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae("flux", small, device, dtype),
        text_encoder=random(lambda: CLIPTextModel(config), device, dtype),
        tokenizer=tokenizer,
        text_encoder_2=transformer_text.t5_encoder(letters).to(device, dtype).eval()
        if small
        else random(lambda: T5EncoderModel(text), device, dtype),
        tokenizer_2=letters,
        transformer=random(lambda: FluxTransformer2DModel(**size), device, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
