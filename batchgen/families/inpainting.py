"""Stable Diffusion 1 and 2: an image repainted where its mask is white."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs
from batchgen.families.calls import (
    call_pipeline,
    decode_scaled,
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
    """``image`` and ``masked``: (n, 2C, H/f, W/f) moments; ``mask``: (n, 1, H/f, W/f) 0 or 1.

    ``masked`` is the image with grey for what the mask repaints. Nothing is drawn here, since the
    pipeline draws of ``masked`` after its noise.
    """
    import torch

    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    images, masks = inputs.images["image"], inputs.images["mask"]
    known: dict[tuple[int, int], torch.Tensor] = {}
    for image, mask in zip(images, masks, strict=True):
        if (id(image), id(mask)) not in known:
            kept = torch.from_numpy(mask < 128)[None, None]  # (1, 1, H, W)
            pixels = (pixels_of(pipeline, image) * kept).to(device=vae.device, dtype=vae.dtype)
            known[id(image), id(mask)] = vae.encode(pixels).latent_dist.parameters
    # The pipeline makes the mask as small itself, by the same nearest pixels.
    small = [torch.from_numpy(mask[::factor, ::factor] >= 128)[None, None] for mask in masks]
    pairs = zip(images, masks, strict=True)
    return {
        "image": torch.cat([one.parameters for one in posteriors(pipeline, images)]),
        "masked": torch.cat([known[id(image), id(mask)] for image, mask in pairs]),
        "mask": torch.cat(small).to(torch.uint8),
    }


def repaint(pipeline: Any, given: Given) -> torch.Tensor:
    """The VAE's place is taken by ``known_posterior``, whose images are moments."""
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
    """(B, C, H/f, W/f) scaled latents of the images, drawn as the first of a sample's numbers.

    A U-Net of 9 channels starts from noise alone at a strength of 1: then the pipeline does not
    encode the image, and does not look at what is given for it.
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
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_masked,
            denoise=repaint,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="prompt_embeds, the mask and the image's latents in, latents out; the masked image"
        " goes in as the moments of its posterior, of which a stand-in for the VAE draws when the"
        " pipeline does",
        null=NULL,
        channels=((1, 0), (2, 1)),
        image_latent_channels=4,
        settings=("strength", "eta"),
        strength=1.0,
    ),
)
