"""Plain calls of diffusers for a micro-batch, as its user writes them: what batchgen must equal.

Prompts are encoded one by one, as batchgen does, since a batch of prompts rounds differently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from batchgen.families import Family
from batchgen.models.own import ClassEmbedder
from batchgen.records import ConditionBatch, Sample
from batchgen.stages.encode import sample_generator
from tests.family_stages import Array, as_array, pil
from tests.transformer_calls import ENCODERS, text_arguments

PASSED_ON = ("strength", "eta", "noise_level", "image_guidance_scale")


@torch.no_grad()
def plain_pixels(family: Family, folder: Path, given: ConditionBatch, device: str) -> Array:
    """uint8 (n, H, W, 3) of the family's pipeline."""
    if family.name == "stable-diffusion-xl-refiner":
        return _refined(folder, given, device)
    pipeline = _pipeline(family.pipeline, folder, device, **_absent(family))
    if family.name.startswith("ip-adapter"):
        weights = next((folder / "ip_adapter").glob("*.safetensors"))
        pipeline.load_ip_adapter(str(weights.parent), subfolder="", weight_name=weights.name)
        pipeline.to(device)
    arguments = SPECIAL.get(family.name, _usual)(family, pipeline, given, folder)
    return _called(pipeline, arguments, given)


def _pipeline(name: str, folder: Path, device: str, **parts: Any) -> Any:
    pipeline = getattr(diffusers, name).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _absent(family: Family) -> dict[str, Any]:
    if family.name == "ldm-class":
        return {"tokenizer": None, "text_encoder": None}
    unsafe = family.name == "image-variation"
    return {"safety_checker": None, "requires_safety_checker": False} if unsafe else {}


def _called(pipeline: Any, arguments: dict[str, Any], given: ConditionBatch) -> Array:
    """The images of a call with the arguments that the pipeline takes, on its device."""
    call, known = given.call, inspect.signature(pipeline.__call__).parameters
    shared: dict[str, Any] = {
        "num_inference_steps": call.num_inference_steps,
        "guidance_scale": call.guidance_scale,
        "width": call.width,
        "height": call.height,
        "generator": [sample_generator(one) for one in given.samples],
        **{name: getattr(call, name) for name in PASSED_ON if getattr(call, name) is not None},
    }
    every = {name: value for name, value in shared.items() if name in known} | arguments
    moved = {
        name: value.to(pipeline.device) if isinstance(value, torch.Tensor) else value
        for name, value in every.items()
    }
    return as_array(pipeline(**moved).images)


def _usual(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    """Embeddings of the prompts, and images by the names that most pipelines have."""
    return {**_text(pipeline, given), **_images(family, given)}


def _images(family: Family, given: ConditionBatch) -> dict[str, Any]:
    names = {"image": "image", "mask": "mask_image"}
    if family.task == "control" and family.name != "depth-to-image":
        names = {"control": "image"}
    found: dict[str, Any] = {
        name: [pil(one) for one in given.images[part]]
        for part, name in names.items()
        if part in given.images
    }
    if family.name == "depth-to-image" and "control" in given.images:
        maps = np.stack([one[..., 0] for one in given.images["control"]])
        found["depth_map"] = torch.from_numpy(maps).float()
    return found


def _text(pipeline: Any, given: ConditionBatch) -> dict[str, torch.Tensor]:
    """Arguments with the embeddings of the prompts and, for guidance, of the negative prompts."""
    guided = given.call.guidance_scale > 1
    if hasattr(pipeline, "text_encoder_2"):
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        each = [_encoded(pipeline, one, guided) for one in given.samples]
        joined = dict(zip(names, zip(*each, strict=True), strict=True))
        return {name: torch.cat(one) for name, one in joined.items() if one[0] is not None}
    found = {"prompt_embeds": [_alone(pipeline, one.prompt) for one in given.samples]}
    if guided and not type(pipeline).__name__.startswith("LatentConsistency"):
        negatives = [_alone(pipeline, one.negative_prompt) for one in given.samples]
        found["negative_prompt_embeds"] = negatives
    return {name: torch.cat(one) for name, one in found.items()}


def _encoded(pipeline: Any, sample: Sample, guided: bool) -> Any:
    return pipeline.encode_prompt(
        sample.prompt,
        do_classifier_free_guidance=guided,
        negative_prompt=sample.negative_prompt or None,
    )


def _alone(pipeline: Any, text: str) -> torch.Tensor:
    if hasattr(pipeline, "encode_prompt"):
        return torch.as_tensor(pipeline.encode_prompt(text, pipeline.device, 1, False)[0])
    return torch.as_tensor(pipeline._encode_prompt(text, pipeline.device, 1, False))


def _transformer(
    family: Family, pipeline: Any, given: ConditionBatch, folder: Path
) -> dict[str, Any]:
    if family.name == "qwen-image":  # without a negative prompt it would run without guidance
        samples = [
            replace(one, negative_prompt=one.negative_prompt or " ") for one in given.samples
        ]
        given = replace(given, samples=tuple(samples))
    made = {**text_arguments(family.name, pipeline, given), **_images(family, given)}
    if family.name in ("pixart-alpha", "pixart-sigma", "sana"):
        made["use_resolution_binning"] = False
    if family.name == "qwen-image":
        made |= {"true_cfg_scale": given.call.guidance_scale, "max_sequence_length": 1024}
        made["guidance_scale"] = None
    return made


def _upscaled_latents(
    family: Family, pipeline: Any, given: ConditionBatch, folder: Path
) -> dict[str, Any]:
    """The latent upscaler takes pooled embeddings too."""
    found: dict[str, Any] = _images(family, given)
    for prefix, name in (("", "prompt"), ("negative_", "negative_prompt")):
        encoded = [
            pipeline.encode_prompt(getattr(one, name), pipeline.device, False)
            for one in given.samples
        ]
        found[f"{prefix}prompt_embeds"] = torch.cat([one[0] for one in encoded])
        found[f"{prefix}pooled_prompt_embeds"] = torch.cat([one[2] for one in encoded])
    return found


def _classes(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    labels = [one.class_label for one in given.samples]
    if family.name == "dit":
        return {"class_labels": labels}
    table = ClassEmbedder.from_pretrained(folder / "class_embedder").embedding.weight.detach()
    return {
        "prompt_embeds": table[labels][:, None],
        "negative_prompt_embeds": table[[-1] * len(labels)][:, None],
    }


def _count(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    return {"batch_size": len(given.samples)}


def _words(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    return {"prompt": [one.prompt for one in given.samples]}


def _low(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    from diffusers.pipelines.latent_diffusion import (
        pipeline_latent_diffusion_superresolution as library,
    )

    return {"image": torch.cat([library.preprocess(pil(one)) for one in given.images["image"]])}


def _pictures(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    return _images(family, given)


def _unclip(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    level = given.call.noise_level or 0
    return {**_text(pipeline, given), **_images(family, given), "noise_level": level}


def _image_prompt(
    family: Family, pipeline: Any, given: ConditionBatch, folder: Path
) -> dict[str, Any]:
    """The plain call shows one image to all samples, so they must be variants of one row."""
    scale = given.call.image_prompt_scale
    pipeline.set_ip_adapter_scale(1.0 if scale is None else scale)
    return {**_text(pipeline, given), "ip_adapter_image": pil(given.images["image"][0])}


def _regions(family: Family, pipeline: Any, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    regions = given.call.regions or ()
    return {
        **_text(pipeline, given),
        "gligen_phrases": [phrase for phrase, _ in regions],
        "gligen_boxes": [list(box) for _, box in regions],
    }


def _refined(folder: Path, given: ConditionBatch, device: str) -> Array:
    """The base model and its refiner, as the library's guide combines them."""
    base = _pipeline("StableDiffusionXLPipeline", folder, device)
    refiner = _pipeline("StableDiffusionXLImg2ImgPipeline", folder / "refiner", device)
    refiner.vae = base.vae
    end = given.call.denoising_end or 0.8
    shared = {
        "num_inference_steps": given.call.num_inference_steps,
        "guidance_scale": given.call.guidance_scale,
        "generator": [sample_generator(one) for one in given.samples],
    }
    size = {"width": given.call.width, "height": given.call.height}
    first = {**shared, **size, "denoising_end": end, "output_type": "latent"}
    latents = base(**_text(base, given), **first).images
    again = {**shared, "image": latents, "denoising_start": end}
    return as_array(refiner(**_text(refiner, given), **again).images)


Arguments = Callable[[Family, Any, ConditionBatch, Path], dict[str, Any]]
SPECIAL: dict[str, Arguments] = {
    **dict.fromkeys(ENCODERS, _transformer),
    "latent-upscaler": _upscaled_latents,
    "dit": _classes,
    "ldm-class": _classes,
    "ldm": _count,
    "ldm-bert": _words,
    "ldm-super-resolution": _low,
    "image-variation": _pictures,
    "unclip": _unclip,
    "ip-adapter": _image_prompt,
    "ip-adapter-xl": _image_prompt,
    "gligen": _regions,
}
