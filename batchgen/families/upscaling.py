"""Super-resolution: the x4 upscaler and the latent upscaler (x2) of Stable Diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs
from batchgen.families.calls import (
    call_pipeline,
    decode_scaled,
    device_of,
    filled_images,
    known_posterior,
    pixels_of,
)
from batchgen.families.family import Family
from batchgen.families.stable_diffusion import TOKENIZERS, encode_prompt
from batchgen.families.stable_diffusion_xl import in_float32
from batchgen.records import Call

if TYPE_CHECKING:
    import torch


def encode_small(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, height / 4, width / 4, 3) uint8. The denoiser reads the pixels."""
    import numpy as np
    import torch

    return {"image": torch.from_numpy(np.stack(inputs.images["image"]))}


def enlarge(pipeline: Any, given: Given) -> torch.Tensor:
    from PIL import Image

    pixels = given.conditions["image"].cpu().numpy()
    level = given.call.noise_level
    return call_pipeline(
        pipeline,
        given,
        image=[Image.fromarray(image) for image in pixels],
        **({} if level is None else {"noise_level": level}),
        eta=given.call.eta,
    )


def decode_enlarged(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Decode as the pipeline does: in float32 if float16 would overflow (``force_upcast``)."""
    import torch

    vae = pipeline.vae
    with in_float32(vae, bool(vae.dtype == torch.float16 and vae.config.force_upcast)):
        return decode_scaled(pipeline, latents.to(vae.dtype), call)


def encode_pooled_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return CLIP's ``prompt_embeds`` (1, T, D) and ``pooled_prompt_embeds`` (1, D)."""
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device_of(pipeline), False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_small_latents(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, h, w) scaled latents; all posteriors are encoded at once."""
    import torch

    vae = pipeline.vae
    pixels = torch.cat([pixels_of(pipeline, one) for one in filled_images(inputs, "image")])
    moments = vae.encode(pixels.to(device_of(pipeline), vae.dtype)).latent_dist.parameters
    drawn = [
        known_posterior(one[None]).latent_dist.sample(generator)
        for one, generator in zip(moments, inputs.generators, strict=False)
    ]
    return {"image": torch.cat(drawn) * vae.config.scaling_factor}


def enlarge_latents(pipeline: Any, given: Given) -> torch.Tensor:
    return call_pipeline(pipeline, given, image=given.conditions["image"])


FAMILIES = (
    Family(
        name="stable-diffusion-x4",
        task="super-resolution",
        pipeline="StableDiffusionUpscalePipeline",
        saved_as=("StableDiffusionUpscalePipeline",),
        encoder=("tokenizer", "text_encoder"),
        denoiser=("unet", "scheduler", "low_res_scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_small,
            denoise=enlarge,
            decode=decode_enlarged,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the small image in, latents out",
        null=("safety_checker", "feature_extractor", "watermarker"),
        channels=((1, 3),),
        upscale=0,  # each pixel of the small image becomes one latent
        settings=("noise_level", "eta"),
        multiple_of=0,  # the size of the small image must be a multiple of the VAE's factor, too
        recommended=(75, 9.0),
    ),
    Family(
        name="latent-upscaler",
        task="super-resolution",
        pipeline="StableDiffusionLatentUpscalePipeline",
        saved_as=("StableDiffusionLatentUpscalePipeline",),
        encoder=("tokenizer", "text_encoder", "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache"),
        adapter=Adapter(
            encode_prompt=encode_pooled_prompt,
            encode_images=encode_small_latents,
            denoise=enlarge_latents,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: the prompt's embeddings and the small image's latents in,"
        " latents out; unlike with text, a guidance_scale of 0 does not drop the prompt",
        channels=((2, 0),),
        image_latent_channels=4,
        upscale=2,
        multiple_of=8,  # latents are halved three times
        schedulers=("EulerDiscreteScheduler",),
        recommended=(20, 0.0),
    ),
)
