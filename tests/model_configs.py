"""Folders of the true Stable Diffusion 1.5, SDXL and Flux: configurations without any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import gpu_models

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def write_configs(model: str, folder: Path) -> Path:
    """Write ``sd15`` or ``sdxl``: real tokenizer and scheduler files, and weights of one byte."""
    pipeline = _built(model, folder)
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if hasattr(part, "parameters"):
            (part.save_config if hasattr(part, "save_config") else part.config.save_pretrained)(
                folder / name
            )
            stem = WEIGHTS.get(name, "model")
            (folder / name / f"{stem}.safetensors").write_bytes(b"0")
        elif part is not None:
            part.save_pretrained(folder / name)
    return folder


def _built(model: str, folder: Path) -> Any:
    """The pipeline of ``benchmarks/gpu_models.py``, on the meta device."""
    import torch

    def bare(make: Any, *_: Any, **__: Any) -> Any:
        with torch.device("meta"):
            return make()

    before = gpu_models.random
    gpu_models.random = bare
    try:
        make = gpu_models._sd15 if model == "sd15" else gpu_models._sdxl
        return make(folder, False, "meta", torch.float16)
    finally:
        gpu_models.random = before
