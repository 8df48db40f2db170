"""Stable Diffusion 1 and 2: an image repainted where its mask is white."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs
from batchgen.families.calls import (
    call_pipeline,
    decode_scaled,
    device_of,
    known_posterior,
    pixels_of,
    posteriors,
    require_steps,
    size_of,
)
from batchgen.families.family import Family
from batchgen.families.stable_diffusion import (
    NULL,
    SAVED_AS,
    TOKENIZERS,
    encode_prompt,
    strength_of,
)

if TYPE_CHECKING:
    import torch


def encode_masked(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return moments of ``image``, ``masked`` (n, 2C, H/f, W/f), and ``mask`` (n, 1, H/f, W/f).

    ``masked`` is the image with grey where the mask repaints; ``mask`` is 0 or 1. Nothing is drawn
    here, since the pipeline draws from ``masked`` after its noise.
    """
    import torch

    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    images, masks = inputs.images["image"], inputs.images["mask"]
    known: dict[tuple[int, int], torch.Tensor] = {}
    for image, mask in zip(images, masks, strict=True):
        if (id(image), id(mask)) not in known:
            kept = torch.from_numpy(mask < 128)[None, None]  # (1, 1, H, W)
            pixels = (pixels_of(pipeline, image) * kept).to(device_of(pipeline), vae.dtype)
            known[id(image), id(mask)] = vae.encode(pixels).latent_dist.parameters
    # The pipeline would shrink the mask itself, and pick the same pixels.
    small = [torch.from_numpy(mask[::factor, ::factor] >= 128)[None, None] for mask in masks]
    pairs = zip(images, masks, strict=True)
    return {
        "image": torch.cat([one.parameters for one in posteriors(pipeline, images)]),
        "masked": torch.cat([known[id(image), id(mask)] for image, mask in pairs]),
        "mask": torch.cat(small).to(torch.uint8),
    }


def repaint(pipeline: Any, given: Given) -> torch.Tensor:
    """Repaint; ``known_posterior`` replaces the VAE's ``encode`` and takes moments as images."""
    if given.call.strength is not None:
        require_steps(given.call)
    pipeline.vae.encode = known_posterior
    return call_pipeline(
        pipeline,
        given,
        image=_source_latents(pipeline, given),
        mask_image=given.conditions["mask"].float(),
        masked_image_latents=given.conditions["masked"],
        **strength_of(given.call),
        **size_of(given.call),
        eta=given.call.eta,
    )


def _source_latents(pipeline: Any, given: Given) -> torch.Tensor:
    """Draw the scaled latents (B, C, H/f, W/f) of the images, the first draw of each sample.

    With a U-Net of 9 channels and a strength of 1 the pipeline starts from noise only and does not
    encode the image. Then nothing may be drawn, and the returned value is not read.
    """
    import torch

    vae, moments = pipeline.vae, given.conditions["image"]
    if given.call.strength in (None, 1.0) and pipeline.unet.config.in_channels == 9:
        return moments.chunk(2, dim=1)[0]
    drawn = [
        known_posterior(one[None]).latent_dist.sample(generator)
        for one, generator in zip(moments, given.generators, strict=True)
    ]
    latents: torch.Tensor = vae.config.scaling_factor * torch.cat(drawn)
    return latents


FAMILIES = (
    Family(
        name="stable-diffusion",
        task="inpainting",
        pipeline="StableDiffusionInpaintPipeline",
        saved_as=SAVED_AS,
        encoder=("tokenizer", "text_encoder", "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_masked,
            denoise=repaint,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="prompt_embeds, the mask and the image's latents in, latents out; the masked image"
        " goes in as the moments of its posterior, from which a substitute for the VAE draws when"
        " the pipeline does",
        null=NULL,
        channels=((1, 0), (2, 1)),
        image_latent_channels=4,
        settings=("strength", "eta"),
        strength=1.0,
    ),
)
