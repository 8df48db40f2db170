"""Stable Diffusion with an additional image condition: InstructPix2Pix and depth-to-image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs, is_guided
from batchgen.families.calls import (
    call_pipeline,
    decode_scaled,
    device_of,
    filled_images,
    known_posterior,
    pixels_of,
    posteriors,
    require_steps,
)
from batchgen.families.family import Family
from batchgen.families.stable_diffusion import NULL, TOKENIZERS, encode_prompt, strength_of
from batchgen.records import Call

if TYPE_CHECKING:
    import numpy as np
    import torch


def encode_instruction(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return CLIP's ``prompt_embeds`` (1, T, D); the pipeline has no public method for them."""
    embeds = pipeline._encode_prompt(
        prompt, device_of(pipeline), 1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds}


def encode_edited(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, H/f, W/f), the unscaled modes of the posteriors.

    All images are encoded at once, as the pipeline does.
    """
    import torch

    vae = pipeline.vae
    pixels = torch.cat([pixels_of(pipeline, one) for one in filled_images(inputs, "image")])
    latents = vae.encode(pixels.to(device_of(pipeline), vae.dtype)).latent_dist.mode()
    return {"image": latents[: len(inputs.images["image"])]}


def edit(pipeline: Any, given: Given) -> torch.Tensor:
    scale = given.call.image_guidance_scale
    return call_pipeline(
        pipeline,
        given,
        image=given.conditions["image"],
        **({} if scale is None else {"image_guidance_scale": scale}),
        eta=given.call.eta,
    )


def edit_is_guided(call: Call) -> bool:
    """Guidance is off if either scale says so, as in the pipeline."""
    return is_guided(call) and (call.image_guidance_scale is None or call.image_guidance_scale >= 1)


def encode_depth(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, 2C, H/f, W/f) moments; ``depth_map``: (n, H/f, W/f), far to near.

    The depth is the row's control image, or is estimated from the source by the model.

    Raises:
        ValueError: rows have no image, or neither they nor the model have a depth map.
    """
    import torch

    if "image" not in inputs.images:
        raise ValueError("depth-to-image needs an image for every row; set input.columns.image")
    images = inputs.images["image"]
    if "control" in inputs.images:
        depth = _given_depth(inputs.images["control"])
    else:
        depth = _estimated_depth(pipeline, filled_images(inputs, "image"))[: len(images)]
    height, width = images[0].shape[:2]
    factor = pipeline.vae_scale_factor
    # As the pipeline does; it then leaves a map of this size unchanged.
    small = torch.nn.functional.interpolate(
        depth.unsqueeze(1),
        size=(height // factor, width // factor),
        mode="bicubic",
        align_corners=False,
    )
    moments = [one.parameters for one in posteriors(pipeline, images)]
    return {"image": torch.cat(moments), "depth_map": small.squeeze(1)}


def _given_depth(controls: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    """Return (n, H, W) float32: the first channel of grey images. Only relative depth matters."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([image[..., 0] for image in controls])).float()


def _estimated_depth(pipeline: Any, images: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    """Estimate the depth (B, h, w) of all images at once, in the pipeline's precision."""
    import torch
    from PIL import Image

    estimator, dtype = pipeline.depth_estimator, pipeline.vae.dtype
    if estimator is None or pipeline.feature_extractor is None:
        raise ValueError(
            "the model has no depth_estimator and feature_extractor; give every row a depth map"
            " (input.columns.control)"
        )
    pictures = [Image.fromarray(image) for image in images]
    pixels = pipeline.feature_extractor(images=pictures, return_tensors="pt").pixel_values
    device = device_of(pipeline)
    kind = "cpu" if device.type == "meta" else device.type  # torch has no autocast for meta
    with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
        depth: torch.Tensor = estimator(pixels.to(device=device, dtype=dtype)).predicted_depth
    return depth


def from_depth(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise from the source's latents with added noise.

    If the pipeline got latents, it would take their size for that of the pixels. So it gets blank
    pixels, and a VAE whose ``encode`` returns the posteriors of the images one by one.
    """
    import torch

    if given.call.strength is not None:
        require_steps(given.call)
    moments = iter(given.conditions["image"])
    pipeline.vae.encode = lambda _: known_posterior(next(moments)[None])
    blank = torch.zeros(len(given.generators), 3, given.call.height, given.call.width)
    return call_pipeline(
        pipeline,
        given,
        image=blank,
        depth_map=given.conditions["depth_map"],
        **strength_of(given.call),
        eta=given.call.eta,
    )


FAMILIES = (
    Family(
        name="instruct-pix2pix",
        task="image-edit",
        pipeline="StableDiffusionInstructPix2PixPipeline",
        saved_as=("StableDiffusionInstructPix2PixPipeline",),
        encoder=("tokenizer", "text_encoder", "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_instruction,
            encode_images=encode_edited,
            denoise=edit,
            decode=decode_scaled,
            guided=edit_is_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and the image's unscaled latents in, latents out",
        null=NULL,
        channels=((2, 0),),
        image_latent_channels=4,
        settings=("image_guidance_scale", "eta"),
        recommended=(50, 7.5),
    ),
    Family(
        name="depth-to-image",
        task="control",
        pipeline="StableDiffusionDepth2ImgPipeline",
        saved_as=("StableDiffusionDepth2ImgPipeline",),
        encoder=("tokenizer", "text_encoder", "vae", "depth_estimator", "feature_extractor"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_depth,
            denoise=from_depth,
            decode=decode_scaled,
            tokenizers=TOKENIZERS,
        ),
        split="prompt_embeds and depth_map in, latents out; the image goes in as the moments of its"
        " posterior, from which a substitute for the VAE draws when the pipeline encodes blank"
        " pixels",
        optional=("depth_estimator", "feature_extractor"),
        needs=("image",),
        optional_control=True,
        channels=((1, 1),),
        settings=("strength", "eta"),
        strength=0.8,
    ),
)
