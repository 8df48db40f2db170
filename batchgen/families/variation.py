"""Image variations: models whose prompt is an image (CLIP image embeddings, unCLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchgen.families import stable_diffusion, stable_diffusion_xl
from batchgen.families.adapter import Adapter, Given, ImageInputs, is_guided
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, size_of
from batchgen.families.family import Family

if TYPE_CHECKING:
    import numpy as np
    import torch


class Encoded:
    """Replaces the image encoder: returns embeddings that another stage has made."""

    def __init__(self, embeds: torch.Tensor) -> None:
        self.image_embeds = embeds

    def __call__(self, image: torch.Tensor) -> Encoded:
        return Encoded(image)

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yield the embeddings: the pipeline reads the dtype of the first parameter."""
        yield self.image_embeds


@contextmanager
def encoded_already(pipeline: Any, embeds: torch.Tensor) -> Iterator[None]:
    """Replace the pipeline's image encoder inside the context."""
    pipeline.image_encoder = Encoded(embeds)
    try:
        yield
    finally:
        pipeline.image_encoder = None


def pictures(images: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    """Convert arrays to PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in images]


def encode_pictures(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return the CLIP image encoder's ``embeds`` (n, D), all B images at once, as the pipelines."""
    images = pictures(inputs.images["image"])
    images += images[:1] * (inputs.batch_size - len(images))
    encoder = pipeline.image_encoder
    pixels = pipeline.feature_extractor(images=images, return_tensors="pt").pixel_values
    embeds = encoder(pixels.to(device_of(pipeline), encoder.dtype)).image_embeds
    return {"embeds": embeds[: len(inputs.images["image"])]}


def by_picture(pipeline: Any, given: Given) -> torch.Tensor:
    embeds = given.conditions["embeds"]
    with encoded_already(pipeline, embeds):
        return call_pipeline(
            pipeline, given, image=embeds, eta=given.call.eta, **size_of(given.call)
        )


def by_noised_picture(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise; each sample's generator draws the noise of its embedding first, then its latents."""
    embeds = given.conditions["embeds"]
    with encoded_already(pipeline, embeds):
        return call_pipeline(
            pipeline,
            given,
            image_embeds=embeds,
            noise_level=given.call.noise_level or 0,
            eta=given.call.eta,
            **size_of(given.call),
        )


def encode_prompted_pictures(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``embeds`` (n, 1, D), or hidden states (n, 1, T, D), whichever the IP-Adapter takes.

    Each image is encoded by itself, as the pipelines do. With guidance, ``negatives`` are the
    embeddings of no image.
    """
    import torch

    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    images = inputs.images["image"]
    for image in images:
        if id(image) not in known:
            known[id(image)] = pipeline.encode_image(
                pictures([image])[0], device_of(pipeline), 1, pipeline.reads_hidden_states
            )
    embeds, negatives = zip(*(known[id(image)] for image in images), strict=True)
    encoded = {"embeds": torch.stack(embeds)}
    return {**encoded, "negatives": torch.stack(negatives)} if is_guided(inputs.call) else encoded


def by_prompted_picture(pipeline: Any, given: Given) -> torch.Tensor:
    scale = given.call.image_prompt_scale
    pipeline.set_ip_adapter_scale(1.0 if scale is None else scale)
    with each_its_own(pipeline, given):
        return call_pipeline(
            pipeline,
            given,
            ip_adapter_image_embeds=[given.conditions["embeds"]],
            eta=given.call.eta,
            **size_of(given.call),
        )


@contextmanager
def each_its_own(pipeline: Any, given: Given) -> Iterator[None]:
    """Give each sample its own image inside the context; the pipeline would repeat one for all."""
    import torch

    def prepare(_: Any, embeds: list[torch.Tensor], *more: Any) -> list[torch.Tensor]:
        guided = more[-1]
        return [torch.cat([given.conditions["negatives"], *embeds])] if guided else embeds

    pipeline.prepare_ip_adapter_image_embeds = prepare
    try:
        yield
    finally:
        del pipeline.prepare_ip_adapter_image_embeds


IP_ADAPTER_SPLIT = (
    "by public arguments: prompt_embeds and ip_adapter_image_embeds in, latents out; the function"
    " that repeats one image for all samples of a call is replaced, so that each has its own"
)
FAMILIES: tuple[Family, ...] = (
    Family(
        name="image-variation",
        task="variation",
        pipeline="StableDiffusionImageVariationPipeline",
        saved_as=("StableDiffusionImageVariationPipeline",),
        encoder=("image_encoder", "feature_extractor"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_images=encode_pictures,
            denoise=by_picture,
            decode=decode_scaled,
            guided=lambda call: False,  # there is no negative prompt
        ),
        split="the image's embeddings go in as the image, through a substitute for the image"
        " encoder; latents come out",
        null=("safety_checker",),
        guidance="null",
        settings=("eta",),
    ),
    Family(
        name="unclip",
        task="variation",
        pipeline="StableUnCLIPImg2ImgPipeline",
        saved_as=("StableUnCLIPImg2ImgPipeline",),
        encoder=("tokenizer", "text_encoder", "image_encoder", "feature_extractor"),
        denoiser=("unet", "scheduler", "image_normalizer", "image_noising_scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion.encode_prompt,
            encode_images=encode_pictures,
            denoise=by_noised_picture,
            decode=decode_scaled,
            tokenizers=(("tokenizer", 0),),
        ),
        split="by public arguments: prompt_embeds and image_embeds in, latents out; a substitute"
        " for the image encoder provides its dtype",
        settings=("eta", "noise_level"),
        recommended=(20, 10.0),
    ),
    Family(
        name="ip-adapter",
        task="variation",
        pipeline="StableDiffusionPipeline",
        saved_as=stable_diffusion.SAVED_AS,
        encoder=("tokenizer", "text_encoder", "image_encoder", "feature_extractor"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion.encode_prompt,
            encode_images=encode_prompted_pictures,
            denoise=by_prompted_picture,
            decode=decode_scaled,
            tokenizers=(("tokenizer", 0),),
        ),
        split=IP_ADAPTER_SPLIT,
        optional=("feature_extractor",),
        null=("safety_checker",),
        settings=("eta", "image_prompt_scale"),
        needs_ip_adapter=True,
        external=("vae", "image_encoder"),
    ),
    Family(
        name="ip-adapter-xl",
        task="variation",
        pipeline="StableDiffusionXLPipeline",
        saved_as=stable_diffusion_xl.SAVED_AS,
        encoder=(*stable_diffusion_xl.TEXT, "image_encoder", "feature_extractor"),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion_xl.encode_prompt,
            encode_images=encode_prompted_pictures,
            denoise=by_prompted_picture,
            decode=stable_diffusion_xl.decode,
            tokenizers=stable_diffusion_xl.TOKENIZERS,
        ),
        split=IP_ADAPTER_SPLIT,
        optional=("feature_extractor",),
        settings=("eta", "image_prompt_scale"),
        needs_ip_adapter=True,
        external=("vae", "image_encoder"),
        recommended=stable_diffusion_xl.RECOMMENDED,
    ),
)
