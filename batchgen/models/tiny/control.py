"""Tiny models with control images, and their ControlNets and T2I-Adapters as single components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny import stable_diffusion_xl
from batchgen.models.tiny.parts import (
    SIZE,
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    unet,
)

FACTOR = 4  # pixels per latent, each way
# An adapter adds its images after a block's layers, before the block makes them smaller.
ATTENDING_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def build_controlnet(folder: Path) -> Path:
    """Stable Diffusion with one ControlNet."""
    from diffusers import StableDiffusionControlNetPipeline

    with seeded():
        parts = _parts(folder)
        parts["controlnet"] = _controlnet(parts["unet"])
        return _saved(StableDiffusionControlNetPipeline(**parts), folder)


def build_controlnet_xl(folder: Path) -> Path:
    """Stable Diffusion XL with one ControlNet."""
    from diffusers import StableDiffusionXLControlNetPipeline, UNet2DConditionModel

    stable_diffusion_xl.build_base(folder)
    with seeded():
        net = _controlnet(UNet2DConditionModel.from_pretrained(folder / "unet"))
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(folder, controlnet=net)
    return _saved(pipeline, folder)


def build_adapter(folder: Path) -> Path:
    """Stable Diffusion with one T2I-Adapter."""
    from diffusers import StableDiffusionAdapterPipeline

    with seeded():
        parts = _parts(folder, **ATTENDING_FIRST)
        del parts["image_encoder"]
        return _saved(StableDiffusionAdapterPipeline(**parts, adapter=_adapter()), folder)


def build_adapter_xl(folder: Path) -> Path:
    """Stable Diffusion XL with one T2I-Adapter."""
    from diffusers import StableDiffusionXLAdapterPipeline

    stable_diffusion_xl.build_base(folder)
    with seeded():
        adapter = _adapter(xl=True)
    pipeline = StableDiffusionXLAdapterPipeline.from_pretrained(folder, adapter=adapter)
    return _saved(pipeline, folder)


def build_gligen(folder: Path) -> Path:
    """Stable Diffusion with GLIGEN's gates open; in a new model they are closed."""
    import torch
    from diffusers import StableDiffusionGLIGENPipeline

    with seeded():
        parts = _parts(folder, attention_type="gated")
        del parts["image_encoder"]
        parts["unet"].position_net.apply(_sharpen)
        for module in parts["unet"].modules():
            if type(module).__name__ == "GatedSelfAttentionDense":
                torch.nn.init.constant_(module.alpha_attn, 3.0)
                torch.nn.init.constant_(module.alpha_dense, 0.5)
                module.linear.apply(_sharpen)
                module.attn.apply(_sharpen)
        return _saved(StableDiffusionGLIGENPipeline(**parts), folder)


def build_lone_controlnet(folder: Path, seed: int = 8, **changes: Any) -> Path:
    """A single ControlNet, for ``model.components``; ``changes`` are those of its U-Net."""
    with seeded(seed):
        return _saved(_controlnet(unet(SIZE // FACTOR, 4, **changes)), folder)


def build_lone_adapter(folder: Path, seed: int = 8, in_channels: int = 3, xl: bool = False) -> Path:
    """A single T2I-Adapter, for ``model.components``; one channel reads grey images."""
    with seeded(seed):
        return _saved(_adapter(in_channels, xl), folder)


def _parts(folder: Path, **unet_changes: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    tokenizer = clip_tokenizer(folder / "tokenizer")
    return {
        "vae": autoencoder(FACTOR),
        "text_encoder": clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(SIZE // FACTOR, 4, **unet_changes),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


def _controlnet(of: Any) -> Any:
    """A ControlNet for a U-Net, with noise in the layers that are zero before training.

    The layers that read the control image are made to keep its contrast, so that it matters.
    """
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(8, 16, 16))
    reader = net.controlnet_cond_embedding
    for layer in (reader.conv_in, *reader.blocks):
        _fill(layer, 2.0)
    for layer in (reader.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
        _fill(layer, 1.0)
    return net


def _fill(layer: Any, gain: float) -> None:
    """Fill a convolution with noise that multiplies its input's deviation by about ``gain``."""
    import torch

    torch.nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)
    torch.nn.init.zeros_(layer.bias)


def _sharpen(module: Any) -> None:
    """Enlarge the weights of a linear layer, so that other inputs give clearly other outputs."""
    import torch

    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=2.0 * module.in_features**-0.5)


def _adapter(in_channels: int = 3, xl: bool = False) -> Any:
    from diffusers import T2IAdapter

    return T2IAdapter(
        in_channels=in_channels,
        channels=[32, 64],  # those of the U-Net's blocks
        num_res_blocks=1,
        downscale_factor=FACTOR * (2 if xl else 1),
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("control", "controlnet"): build_controlnet,
    ("control", "controlnet-xl"): build_controlnet_xl,
    ("control", "t2i-adapter"): build_adapter,
    ("control", "t2i-adapter-xl"): build_adapter_xl,
    ("control", "gligen"): build_gligen,
}
