"""Stable Diffusion 1 and 2, and their latent consistency models: text- and image-to-image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs, never_guided
from batchgen.families.calls import (
    call_pipeline,
    decode_scaled,
    device_of,
    posteriors,
    require_steps,
    size_of,
)
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

NULL = ("safety_checker", "feature_extractor", "image_encoder")
SAVED_AS = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
CONSISTENT_SAVED_AS = (
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
TOKENIZERS = (("tokenizer", 0),)


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return CLIP's ``prompt_embeds`` (1, T, D). A negative prompt is encoded like any other."""
    embeds, _ = pipeline.encode_prompt(
        prompt, device_of(pipeline), 1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds}


def encode_source(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, H/f, W/f) scaled latents, drawn from each image's posterior."""
    import torch

    drawn = [
        posterior.sample(generator)
        for posterior, generator in zip(
            posteriors(pipeline, inputs.images["image"]), inputs.generators, strict=True
        )
    ]
    return {"image": pipeline.vae.config.scaling_factor * torch.cat(drawn)}


def from_noise(pipeline: Any, given: Given) -> torch.Tensor:
    return call_pipeline(pipeline, given, **size_of(given.call), eta=given.call.eta)


def from_source(pipeline: Any, given: Given) -> torch.Tensor:
    require_steps(given.call)
    return call_pipeline(
        pipeline,
        given,
        image=given.conditions["image"],
        strength=given.call.strength,
        eta=given.call.eta,
    )


def consistent_from_noise(pipeline: Any, given: Given) -> torch.Tensor:
    return call_pipeline(pipeline, given, **size_of(given.call))


def consistent_from_source(pipeline: Any, given: Given) -> torch.Tensor:
    """Run all steps at any strength, which sets only the amount of noise at the start."""
    return call_pipeline(
        pipeline, given, image=given.conditions["image"], **strength_of(given.call)
    )


def strength_of(call: Call) -> dict[str, float]:
    """Return ``strength`` as an argument; nothing if the call does not set it."""
    return {} if call.strength is None else {"strength": call.strength}


FAMILIES = (
    Family(
        name="stable-diffusion",
        task="text-to-image",
        pipeline="StableDiffusionPipeline",
        saved_as=SAVED_AS,
        encoder=("tokenizer", "text_encoder"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=from_noise,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds in, latents out",
        null=NULL,
        settings=("eta",),
    ),
    Family(
        name="stable-diffusion",
        task="image-to-image",
        pipeline="StableDiffusionImg2ImgPipeline",
        saved_as=SAVED_AS,
        encoder=("tokenizer", "text_encoder", "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_source,
            denoise=from_source,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the source's latents in, latents out",
        null=NULL,
        image_latent_channels=4,
        settings=("strength", "eta"),
    ),
    Family(
        name="latent-consistency",
        task="text-to-image",
        pipeline="LatentConsistencyModelPipeline",
        saved_as=CONSISTENT_SAVED_AS,
        encoder=("tokenizer", "text_encoder"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=consistent_from_noise,
            decode=decode_scaled,
            guided=never_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds in, latents out",
        null=NULL,
        guidance="embedded",
        schedulers=("LCMScheduler",),
        recommended=(4, 8.5),
    ),
    Family(
        name="latent-consistency",
        task="image-to-image",
        pipeline="LatentConsistencyModelImg2ImgPipeline",
        saved_as=CONSISTENT_SAVED_AS,
        encoder=("tokenizer", "text_encoder", "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_source,
            denoise=consistent_from_source,
            decode=decode_scaled,
            guided=never_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the source's latents in, latents out",
        null=NULL,
        image_latent_channels=4,
        guidance="embedded",
        settings=("strength",),
        schedulers=("LCMScheduler",),
        recommended=(4, 8.5),
    ),
)
