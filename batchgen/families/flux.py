"""Flux.1: text-to-image and image-to-image.

The model reads the guidance scale as a number (dev) or ignores it (schnell), so no negative prompts
are encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, never_guided
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, require_steps, size_of
from batchgen.families.calls import shifted_source as encode_source
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

T5_TOKENS = 512
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
SAVED_AS = ("FluxPipeline", "FluxImg2ImgPipeline")
TOKENIZERS = (("tokenizer", 0), ("tokenizer_2", T5_TOKENS))


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` (1, T, D) of T5 and ``pooled_prompt_embeds`` (1, P) of CLIP."""
    embeds, pooled, _ = pipeline.encode_prompt(prompt, None, device_of(pipeline))
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def from_noise(pipeline: Any, given: Given) -> torch.Tensor:
    """Return (B, h/2 * w/2, 4 * C): latents in blocks of 2 x 2, the pipeline's packed form."""
    return call_pipeline(pipeline, given, **size_of(given.call))


def from_source(pipeline: Any, given: Given) -> torch.Tensor:
    require_steps(given.call)
    return call_pipeline(
        pipeline,
        given,
        **size_of(given.call),
        image=given.conditions["image"],
        strength=given.call.strength,
    )


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    unpacked = pipeline._unpack_latents(
        latents, call.height, call.width, pipeline.vae_scale_factor
    )  # (B, C, h, w)
    return decode_scaled(pipeline, unpacked, call)


FAMILIES = (
    Family(
        name="flux",
        task="text-to-image",
        pipeline="FluxPipeline",
        saved_as=SAVED_AS,
        encoder=TEXT,
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("mag_cache", "taylor_seer", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=from_noise,
            decode=decode,
            guided=never_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds in, packed latents out",
        null=("image_encoder", "feature_extractor"),
        size=128,
        channels=((4, 0),),
        guidance="embedded",
        multiple_of=2,
        recommended=(28, 3.5),
    ),
    Family(
        name="flux",
        task="image-to-image",
        pipeline="FluxImg2ImgPipeline",
        saved_as=SAVED_AS,
        encoder=(*TEXT, "vae"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("tiny_vae",),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_source,
            denoise=from_source,
            decode=decode,
            guided=never_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the source's latents in, packed latents out",
        null=("image_encoder", "feature_extractor"),
        size=128,
        channels=((4, 0),),
        guidance="embedded",
        settings=("strength",),
        multiple_of=2,
        recommended=(28, 7.0),
    ),
)
