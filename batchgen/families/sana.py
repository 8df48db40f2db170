"""Sana: text-to-image with a deep-compression autoencoder and Gemma."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

TOKENS = 299  # the denoiser reads 300 tokens, one of which belongs to the instruction


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return Gemma's ``prompt_embeds`` (1, T, D) and ``prompt_attention_mask`` (1, T).

    The pipeline puts its own instruction before a prompt, but not before a negative prompt.
    """
    defaults = inspect.signature(pipeline.__call__).parameters
    instruction = defaults["complex_human_instruction"].default
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        device=device_of(pipeline),
        complex_human_instruction=None if negative else instruction,
    )
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def denoise(pipeline: Any, given: Given) -> torch.Tensor:
    """Return float32 latents (B, C, h, w), for any dtype of the model."""
    return call_pipeline(
        pipeline,
        given,
        **size_of(given.call),
        negative_prompt=None,  # its default is "", which excludes negative_prompt_embeds
        eta=given.call.eta,
        use_resolution_binning=False,
    )


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    return decode_scaled(pipeline, latents.to(pipeline.vae.dtype), call)


FAMILIES = (
    Family(
        name="sana",
        task="text-to-image",
        pipeline="SanaPipeline",
        saved_as=("SanaPipeline",),
        encoder=("tokenizer", "text_encoder"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval",),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=denoise,
            decode=decode,
            tokenizers=(("tokenizer", TOKENS),),
        ),
        split="by public arguments: prompt_embeds and their mask in, latents out",
        size=("transformer", "sample_size"),
        settings=("eta",),
        recommended=(20, 4.5),
    ),
)
