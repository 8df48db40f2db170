"""Frees the half of a VAE that a stage does not run, and lets the decoder work in tiles."""

from __future__ import annotations

from typing import Any

from batchgen.errors import ModelError


def enable_tiling(vae: Any) -> None:
    """Let the VAE decode images larger than its tiles in overlapping tiles.

    Raises:
        ModelError: this class of VAE cannot.
    """
    if not any(hasattr(vae, name) for name in ("tiled_decode", "_tiled_decode")):
        raise ModelError(
            f"resources.vae_tiling: {type(vae).__name__} cannot decode in tiles; remove it, or "
            "lower resources.decode_batch_size"
        )
    vae.enable_tiling()


def drop(module: Any, *halves: str) -> None:
    """Free the halves of a VAE that the stage does not run.

    Each is replaced by an empty module: the VAE of Qwen-Image counts the layers of both halves.
    """
    import torch

    for name in halves:
        if hasattr(module, name):
            setattr(module, name, torch.nn.Module().eval())
