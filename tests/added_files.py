"""Writes LoRAs and textual inversions to disk, and runs the plain pipeline with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from safetensors.torch import save_file

from batchgen.models.tiny.parts import seeded
from batchgen.records import Call
from tests.family_stages import Array, FamilyStages, as_array, batch, call, generators

TEXT = ("q_proj", "v_proj", "fc1")
PROMPTS = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def build_lora(
    model: Path,
    folder: Path,
    seed: int,
    targets: tuple[str, ...] = ("to_q", "to_v"),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A LoRA of the denoiser and, where its targets name any, of the text encoders' layers.

    ``config``: of peft, kept in the file; without one the file has weights alone.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    saved: dict[str, Any] = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        chosen = [one for one in targets if (one in TEXT) == name.startswith("text")]
        module = getattr(pipeline, name, None)
        if module is None or not chosen:
            continue
        module.add_adapter(peft.LoraConfig(target_modules=chosen, **(config or {"r": 2})))
        found = peft.utils.get_peft_model_state_dict(module)
        with seeded(seed):  # large enough to tell
            layers = {key: 0.2 * torch.randn(one.shape) for key, one in found.items()}
        saved[f"{name}_lora_layers"] = layers
        if config is not None:
            saved[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, **saved)
    return folder / "pytorch_lora_weights.safetensors"


def named(files: Mapping[str, Path], **weights: float) -> dict[str, Any]:
    """The model's field ``loras``."""
    rows = [{"name": name, "path": str(path)} for name, path in files.items()]
    return {"loras": [row | {"weight": weights.get(row["name"], 1.0)} for row in rows]}


@torch.no_grad()
def plain_pixels(pipeline: Any, shared: Call, **more: Any) -> Array:
    """What the plain pipeline makes of three rows, prompts encoded one by one."""
    given = batch([0, 1, 2], shared)
    names = PROMPTS + (POOLED if hasattr(pipeline, "text_encoder_2") else ())
    if isinstance(pipeline, diffusers.FluxPipeline):
        names = ("prompt_embeds", "pooled_prompt_embeds")
    taken = inspect.signature(pipeline.encode_prompt).parameters
    each = []
    for one in given.samples:
        arguments = {
            "prompt": one.prompt,
            "prompt_2": None,
            "prompt_3": None,
            "device": "cpu",
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "negative_prompt": one.negative_prompt,
        }
        known = {name: value for name, value in arguments.items() if name in taken}
        each.append(pipeline.encode_prompt(**known))
    images = pipeline(
        **{name: torch.cat([one[place] for one in each]) for place, name in enumerate(names)},
        height=32,
        width=32,
        num_inference_steps=shared.num_inference_steps,
        guidance_scale=shared.guidance_scale,
        generator=generators(given),
        **more,
    ).images
    return as_array(images)


def pixels(stages: FamilyStages, shared: Call) -> Array:
    made: Array = stages.fused(batch([0, 1, 2], shared)).pixels
    return made


def lora_call(setting: Mapping[str, float]) -> Call:
    return call(lora=tuple(sorted(setting.items())))


def token_file(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "learned_embeds.safetensors"
    save_file(dict(tensors), file)
    return file


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))
