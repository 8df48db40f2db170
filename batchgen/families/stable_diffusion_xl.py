"""Stable Diffusion XL: text-to-image, image-to-image (also the refiner's), inpainting, edits.

Turbo and Lightning models use the same pipelines, with few steps and a guidance scale of 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs, is_guided
from batchgen.families.calls import (
    call_pipeline,
    decode_by,
    device_of,
    known_posterior,
    pixels_of,
    require_steps,
    size_of,
)
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D) and ``pooled_prompt_embeds`` (1, P).

    They come from one or two text encoders: a refiner has only the second. An empty negative prompt
    is all zeros if the model has ``force_zeros_for_empty_prompt``.
    """
    import torch

    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    if negative and not prompt and pipeline.config.force_zeros_for_empty_prompt:
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_source(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, H/f, W/f) scaled latents for the U-Net, drawn one by one."""
    import torch

    vae = pipeline.vae
    dtype, images = vae.dtype, inputs.images["image"]
    with in_float32(vae, vae.config.force_upcast):
        posteriors = _each_once(
            [id(image) for image in images],
            lambda row: _posterior(pipeline, pixels_of(pipeline, images[row]).to(dtype)),
        )
    drawn = [one.sample(each) for one, each in zip(posteriors, inputs.generators, strict=True)]
    latents = torch.cat(drawn).to(dtype)
    mean, std = _latent_statistics(vae.config, latents)
    if mean is None or std is None:
        return {"image": vae.config.scaling_factor * latents}
    return {"image": (latents - mean) * vae.config.scaling_factor / std}


def encode_masked(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return moments of ``image``, ``masked`` (n, 2C, H/f, W/f), and ``mask`` (n, 1, H/f, W/f).

    ``masked`` is the image without the area that the mask repaints; ``mask`` is 0 or 1. Nothing is
    drawn here, since the pipeline draws from ``masked`` after its noise.
    """
    import torch

    vae = pipeline.vae
    dtype, factor = vae.dtype, pipeline.vae_scale_factor
    images, masks = inputs.images["image"], inputs.images["mask"]

    def masked(row: int) -> Any:
        kept = torch.from_numpy(masks[row] < 128)[None, None]  # (1, 1, H, W)
        return _posterior(pipeline, (pixels_of(pipeline, images[row]) * kept).to(dtype))

    with in_float32(vae, vae.config.force_upcast):
        whole = _each_once(
            [id(image) for image in images],
            lambda row: _posterior(pipeline, pixels_of(pipeline, images[row]).to(dtype)),
        )
        cut = _each_once([(id(i), id(m)) for i, m in zip(images, masks, strict=True)], masked)
    small = [torch.from_numpy(one[::factor, ::factor] >= 128)[None, None] for one in masks]
    return {
        "image": torch.cat([one.parameters for one in whole]),
        "masked": torch.cat([one.parameters for one in cut]),
        "mask": torch.cat(small).to(torch.uint8),
    }


def encode_edited(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, H/f, W/f) unscaled latents, all encoded at once, as the pipeline."""
    import torch

    vae = pipeline.vae
    dtype, images = vae.dtype, inputs.images["image"]
    full = [*images, *[images[0]] * (inputs.batch_size - len(images))]
    pixels = torch.cat([pixels_of(pipeline, image) for image in full]).to(dtype)  # (B, 3, H, W)
    with in_float32(vae, _overflows(vae)):
        latents = _posterior(pipeline, pixels).mode()[: len(images)]
    return {"image": latents.to(dtype)}


def from_noise(pipeline: Any, given: Given) -> torch.Tensor:
    return call_pipeline(pipeline, given, **size_of(given.call), eta=given.call.eta)


def from_source(pipeline: Any, given: Given) -> torch.Tensor:
    require_steps(given.call)
    pipeline.watermark = None  # else this pipeline adds a watermark to wide latents
    return call_pipeline(
        pipeline,
        given,
        image=given.conditions["image"],
        strength=given.call.strength,
        eta=given.call.eta,
    )


def repainted(pipeline: Any, given: Given) -> torch.Tensor:
    """Repaint; ``known_posterior`` replaces the VAE's ``encode`` and takes moments as images."""
    strength = {}
    if given.call.strength is not None:
        require_steps(given.call)
        strength = {"strength": given.call.strength}
    pipeline.vae.encode = known_posterior
    return call_pipeline(
        pipeline,
        given,
        image=_source_latents(pipeline, given),
        mask_image=given.conditions["mask"].float(),
        masked_image_latents=given.conditions["masked"],
        **strength,
        **size_of(given.call),
        eta=given.call.eta,
    )


def edited(pipeline: Any, given: Given) -> torch.Tensor:
    scale = given.call.image_guidance_scale
    return call_pipeline(
        pipeline,
        given,
        image=given.conditions["image"],
        **({} if scale is None else {"image_guidance_scale": scale}),
        **size_of(given.call),
        eta=given.call.eta,
    )


def edit_is_guided(call: Call) -> bool:
    """Guidance is off if either scale says so, as in the pipeline."""
    return is_guided(call) and (call.image_guidance_scale is None or call.image_guidance_scale >= 1)


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Decode as the pipelines do: in float32 if a float16 VAE would overflow (``force_upcast``)."""
    vae = pipeline.vae
    with in_float32(vae, _overflows(vae)):
        latents = latents.to(vae.dtype)
        mean, std = _latent_statistics(vae.config, latents)
        if mean is None or std is None:
            return decode_by(vae, latents / vae.config.scaling_factor)
        return decode_by(vae, latents * std / vae.config.scaling_factor + mean)


@contextmanager
def in_float32(module: Any, when: bool) -> Iterator[None]:
    """Let the module compute in float32 inside the context, if ``when`` is true."""
    import torch

    dtype = module.dtype
    if when:
        module.to(dtype=torch.float32)
    try:
        yield
    finally:
        if when:
            module.to(dtype=dtype)


def _overflows(vae: Any) -> bool:
    import torch

    return bool(vae.dtype == torch.float16 and vae.config.force_upcast)


def _posterior(pipeline: Any, pixels: torch.Tensor) -> Any:
    vae = pipeline.vae
    return vae.encode(pixels.to(device_of(pipeline), vae.dtype)).latent_dist


def _each_once(keys: Sequence[Hashable], make: Callable[[int], Any]) -> list[Any]:
    """Call ``make`` for each row, but once for rows with one key, such as variants of a row."""
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    made = {key: make(row) for key, row in first.items()}
    return [made[key] for key in keys]


def _source_latents(pipeline: Any, given: Given) -> torch.Tensor:
    """Draw the scaled latents (B, C, H/f, W/f) of the images, the first draw of each sample.

    With a U-Net that reads the masked image and a strength of 1 the pipeline starts from noise only
    and does not encode the image. Then nothing may be drawn, and the returned value is not read.
    """
    import torch

    vae, moments = pipeline.vae, given.conditions["image"]
    if given.call.strength == 1 and pipeline.unet.config.in_channels != vae.config.latent_channels:
        return moments.chunk(2, dim=1)[0].to(vae.dtype)
    drawn = [
        known_posterior(one[None]).latent_dist.sample(generator)
        for one, generator in zip(moments, given.generators, strict=True)
    ]
    latents: torch.Tensor = vae.config.scaling_factor * torch.cat(drawn).to(vae.dtype)
    return latents


def _latent_statistics(config: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """Return mean and deviation (1, C, 1, 1) of the latents; (None, None) for most VAEs."""
    import torch

    both = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if None in both:
        return None, None
    mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(like.device, like.dtype) for each in both)
    return mean, std


SAVED_AS = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
NULL = ("image_encoder", "feature_extractor")
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
FIRST_TEXT = ("tokenizer", "text_encoder")  # the refiner does not have them
TOKENIZERS = (("tokenizer", 0), ("tokenizer_2", 0))
RECOMMENDED = (30, 5.0)

FAMILIES = (
    Family(
        name="stable-diffusion-xl",
        task="text-to-image",
        pipeline="StableDiffusionXLPipeline",
        saved_as=SAVED_AS,
        encoder=TEXT,
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=from_noise,
            decode=decode,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompt_embeds and pooled_prompt_embeds in, latents out",
        null=NULL,
        settings=("eta",),
        recommended=RECOMMENDED,
    ),
    Family(
        name="stable-diffusion-xl",
        task="image-to-image",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        saved_as=SAVED_AS,
        encoder=(*TEXT, "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_source,
            denoise=from_source,
            decode=decode,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompts' embeddings and the source's latents in, latents out",
        optional=FIRST_TEXT,
        null=NULL,
        image_latent_channels=4,
        settings=("strength", "eta"),
        recommended=RECOMMENDED,
    ),
    Family(
        name="stable-diffusion-xl",
        task="inpainting",
        pipeline="StableDiffusionXLInpaintPipeline",
        saved_as=SAVED_AS,
        encoder=(*TEXT, "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_masked,
            denoise=repainted,
            decode=decode,
            tokenizers=TOKENIZERS,
        ),
        split=(
            "by public arguments, except that the denoise stage draws the latents of both images"
            " from their moments, since the pipeline draws one of them after its noise"
        ),
        optional=FIRST_TEXT,
        null=NULL,
        channels=((1, 0), (2, 1)),
        image_latent_channels=4,
        settings=("strength", "eta"),
        strength=0.9999,
        recommended=(30, 7.5),
    ),
    Family(
        name="stable-diffusion-xl",
        task="image-edit",
        pipeline="StableDiffusionXLInstructPix2PixPipeline",
        saved_as=("StableDiffusionXLInstructPix2PixPipeline",),
        encoder=(*TEXT, "vae"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            encode_images=encode_edited,
            denoise=edited,
            decode=decode,
            guided=edit_is_guided,
            tokenizers=TOKENIZERS,
        ),
        split="by public arguments: prompts' embeddings and the image's latents in, latents out",
        channels=((2, 0),),
        image_latent_channels=4,
        settings=("image_guidance_scale", "eta"),
        recommended=RECOMMENDED,
    ),
)
