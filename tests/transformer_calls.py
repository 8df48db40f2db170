"""Plain diffusers calls of the transformer families: prompts encoded one by one, then one call."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from batchgen.records import ConditionBatch
from tests.family_stages import generators, pil

ONE_LENGTH = 520  # tokens, as many as batchgen's Qwen-Image always has


def text_arguments(family: str, plain: Any, given: ConditionBatch) -> dict[str, Any]:
    """Embeddings of the prompts and, under guidance, of the negative prompts, as keyword arguments.

    Both come from one call of ``encode_prompt``, as a user would write it.
    """
    rows = [
        ENCODERS[family](plain, one.prompt, one.negative_prompt, given.call.guidance_scale)
        for one in given.samples
    ]
    return {
        name: None
        if rows[0][name] is None
        else torch.cat([row[name] for row in rows])
        if isinstance(rows[0][name], torch.Tensor)
        else [embeds for row in rows for embeds in row[name]]
        for name in rows[0]
    }


def pixart(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    made = plain.encode_prompt(prompt, guidance > 1, negative, clean_caption=False)
    return {"negative_prompt": None, **dict(zip(MASKED, made, strict=True))}


def sana(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    instruction = inspect.signature(plain.__call__).parameters["complex_human_instruction"]
    made = plain.encode_prompt(
        prompt, guidance > 1, negative, complex_human_instruction=instruction.default
    )
    return {"negative_prompt": None, **dict(zip(MASKED, made, strict=True))}


def stable_diffusion_3(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    made = plain.encode_prompt(
        prompt, None, None, negative_prompt=negative, do_classifier_free_guidance=guidance > 1
    )
    return dict(zip(POOLED, made, strict=True))


def flux(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    embeds, pooled, _ = plain.encode_prompt(prompt, None)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def qwen_image(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    made: dict[str, Any] = {}
    for name, text in list(given.items())[: 2 if guidance > 1 else 1]:
        embeds, _ = plain.encode_prompt(text)
        spare = ONE_LENGTH - embeds.shape[1]
        made[name] = torch.nn.functional.pad(embeds, (0, 0, 0, spare))
        made[f"{name}_mask"] = (torch.arange(ONE_LENGTH) < embeds.shape[1])[None].long()
    return made


def z_image(plain: Any, prompt: str, negative: str, guidance: float) -> dict[str, Any]:
    positives, negatives = plain.encode_prompt(prompt, None, guidance > 0, negative)
    return {"prompt_embeds": positives, "negative_prompt_embeds": negatives}


MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
POOLED = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
ENCODERS = {
    "pixart-alpha": pixart,
    "pixart-sigma": pixart,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "sana": sana,
    "qwen-image": qwen_image,
    "z-image": z_image,
}


@torch.no_grad()
def plain_call(family: str, plain: Any, given: ConditionBatch, output_type: str = "pil") -> Any:
    """The plain pipeline's images (or, with ``output_type="latent"``, latents) of a micro-batch."""
    call = given.call
    arguments = text_arguments(family, plain, given)
    if family in ("pixart-alpha", "pixart-sigma", "sana"):
        arguments |= {"use_resolution_binning": False, "eta": call.eta}
    if family == "qwen-image":
        arguments |= {"true_cfg_scale": call.guidance_scale, "max_sequence_length": 1024}
    else:
        arguments["guidance_scale"] = call.guidance_scale
    if given.images:
        arguments["image"] = [pil(image) for image in given.images["image"]]
        arguments["strength"] = call.strength
    return plain(
        **arguments,
        width=call.width,
        height=call.height,
        num_inference_steps=call.num_inference_steps,
        generator=generators(given),
        output_type=output_type,
    ).images
