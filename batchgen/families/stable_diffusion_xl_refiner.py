"""Stable Diffusion XL with its refiner: the base model runs the first part of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchgen.families import stable_diffusion_xl as xl
from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, size_of
from batchgen.families.family import Family

if TYPE_CHECKING:
    import torch

OF_REFINER = "refiner_"
DENOISING_END = 0.8


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return the embeddings of both models; names of the refiner's begin with ``refiner_``."""
    refiners = xl.encode_prompt(pipeline.refiner, prompt, negative)
    return {
        **xl.encode_prompt(pipeline, prompt, negative),
        **{f"{OF_REFINER}{name}": tensor for name, tensor in refiners.items()},
    }


def refined(pipeline: Any, given: Given) -> torch.Tensor:
    """Run the base model up to ``denoising_end`` of the schedule, then the refiner."""
    end, eta = given.call.denoising_end or DENOISING_END, given.call.eta
    base = replace(given, prompts=_bases(given.prompts), negatives=_bases(given.negatives))
    latents = call_pipeline(pipeline, base, **size_of(given.call), eta=eta, denoising_end=end)
    refiner = pipeline.refiner
    refiner.scheduler, refiner.watermark = pipeline.scheduler, None
    rest = replace(given, prompts=_refiners(given.prompts), negatives=_refiners(given.negatives))
    return call_pipeline(refiner, rest, image=latents, eta=eta, denoising_start=end)


def _bases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in tensors.items() if not name.startswith(OF_REFINER)}


def _refiners(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(OF_REFINER): one
        for name, one in tensors.items()
        if name.startswith(OF_REFINER)
    }


FAMILIES = (
    Family(
        name="stable-diffusion-xl-refiner",
        task="text-to-image",
        pipeline="StableDiffusionXLPipeline",
        saved_as=xl.SAVED_AS,
        encoder=(*xl.TEXT, "refiner.tokenizer_2", "refiner.text_encoder_2"),
        denoiser=("unet", "scheduler", "refiner.unet"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=refined,
            decode=xl.decode,
            tokenizers=xl.TOKENIZERS,
        ),
        split=(
            "by public arguments: both models' embeddings in, the base's latents into the refiner"
            " within the denoise stage, latents out; the base's scheduler serves both"
        ),
        null=xl.NULL,
        image_latent_channels=4,
        settings=("eta", "denoising_end"),
        external=("vae", "refiner"),
        pipelines=(("refiner", "StableDiffusionXLImg2ImgPipeline"),),
        recommended=xl.RECOMMENDED,
    ),
)
