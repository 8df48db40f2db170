"""Stable Diffusion 3 and 3.5: text-to-image and image-to-image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, require_steps, size_of
from batchgen.families.calls import shifted_source as encode_source
from batchgen.families.family import Family

if TYPE_CHECKING:
    import torch

T5_TOKENS = 256
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
T5 = ("tokenizer_3", "text_encoder_3")
SAVED_AS = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
TOKENIZERS = (("tokenizer", 0), ("tokenizer_2", 0), ("tokenizer_3", T5_TOKENS))


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D) of two CLIPs and T5, and ``pooled_prompt_embeds`` (1, P).

    In a model without T5 its part is zeros.
    """
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, device_of(pipeline), do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def from_noise(pipeline: Any, given: Given) -> torch.Tensor:
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


FAMILIES = (
    Family(
        name="stable-diffusion-3",
        task="text-to-image",
        pipeline="StableDiffusion3Pipeline",
        saved_as=SAVED_AS,
        encoder=(*TEXT, *T5),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=from_noise,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds in, latents out",
        stubs=("vae", "transformer"),
        optional=T5,
        null=("image_encoder", "feature_extractor"),
        size=("transformer", "sample_size"),
        multiple_of=2,
        recommended=(28, 7.0),
    ),
    Family(
        name="stable-diffusion-3",
        task="image-to-image",
        pipeline="StableDiffusion3Img2ImgPipeline",
        saved_as=SAVED_AS,
        encoder=(*TEXT, *T5, "vae"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_source,
            denoise=from_source,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the source's latents in, latents out",
        stubs=("vae", "transformer"),
        optional=T5,
        null=("image_encoder", "feature_extractor"),
        size=("transformer", "sample_size"),
        settings=("strength",),
        multiple_of=2,
        recommended=(50, 7.0),
    ),
)
