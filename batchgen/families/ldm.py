"""The LDM paper's pipelines (unconditional, class, BERT text, super-resolution) and DiT.

These pipelines return only images, so their calls are split by substitutes: an object replaces a
component of another stage, and returns what that stage made or keeps what it would get.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given, ImageInputs, is_guided
from batchgen.families.calls import decode_by, decode_scaled, device_of
from batchgen.families.family import Family
from batchgen.families.stable_diffusion import from_noise

if TYPE_CHECKING:
    import torch

    from batchgen.records import Call

TOKENS = 77  # fixed in the pipeline, for every model
NULL_CLASS = 1000  # fixed in the pipeline, for every model
SIDE = 8  # pixels per latent, each way; fixed in the pipeline, for every model


# --- substitutes ---------------------------------------------------------------------------------


class KeptLatents:
    """Replaces an autoencoder: keeps the latents that it should decode, and returns black."""

    latents: torch.Tensor

    def __init__(self, config: Any) -> None:
        self.config = config

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        import torch

        self.latents = latents
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 1, 1))


def count_letters(texts: Sequence[str], **_: Any) -> SimpleNamespace:
    """Replaces a tokenizer: tells a prompt from an empty one."""
    import torch

    return SimpleNamespace(input_ids=torch.tensor([[len(text)] for text in texts]))


class MadeEmbeddings:
    """Replaces a text encoder, after ``count_letters``: returns the encode stage's embeddings."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def __call__(self, letters: torch.Tensor) -> tuple[torch.Tensor]:
        made = self.given.prompts if letters.any() else self.given.negatives
        return (made["prompt_embeds"],)


def drawing_from(scheduler: Any, generators: list[torch.Generator]) -> Any:
    """Copy the scheduler, so that its noise comes from the samples' generators.

    These pipelines do not pass their generators to the scheduler, which would draw from torch's
    global one. The copy is new since one pipeline reads state that an earlier call left.
    """
    own = copy.deepcopy(scheduler)
    if "generator" in signature(own.step).parameters:
        own.step = partial(own.step, generator=generators)
    return own


@contextmanager
def holding(pipeline: Any, **components: Any) -> Iterator[None]:
    """Give the pipeline these components inside the context."""
    before = {name: getattr(pipeline, name) for name in components}
    try:
        for name, component in components.items():
            setattr(pipeline, name, component)
        yield
    finally:
        for name, component in before.items():
            setattr(pipeline, name, component)


def kept_latents(
    pipeline: Any, given: Given, vae: str, scheduler: Any, **more: Any
) -> torch.Tensor:
    """Call the pipeline and return the latents that it passes to its autoencoder, unscaled."""
    kept = KeptLatents(getattr(pipeline, vae).config)
    with holding(pipeline, **{vae: kept, "scheduler": scheduler}):
        pipeline(
            generator=given.generators,
            num_inference_steps=given.call.num_inference_steps,
            output_type="pt",
            return_dict=False,
            **more,
        )
    return kept.latents


# --- encode, denoise, decode ---------------------------------------------------------------------


def encode_text(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return BERT's ``prompt_embeds`` (1, 77, D). The only negative prompt is the empty one."""
    tokens = pipeline.tokenizer(
        ["" if negative else prompt],
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return {"prompt_embeds": pipeline.bert(tokens.input_ids.to(device_of(pipeline)))[0]}


def encode_label(pipeline: Any, label: int | None) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, 1, D), a sequence of one vector."""
    return {"prompt_embeds": pipeline.class_embedder(label)}


def encode_low(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, h, w, 3) uint8, the unchanged small images."""
    import numpy as np
    import torch

    return {"image": torch.from_numpy(np.stack(inputs.images["image"]))}


def from_nothing(pipeline: Any, given: Given) -> torch.Tensor:
    scheduler = drawing_from(pipeline.scheduler, given.generators)
    scale, dtype = scheduler.scale_model_input, pipeline.unet.dtype

    def scaled(latents: torch.Tensor, step: Any) -> torch.Tensor:
        read: torch.Tensor = scale(latents, step).to(dtype)
        return read

    scheduler.scale_model_input = scaled  # the pipeline's latents are float32, the model's may not
    return kept_latents(
        pipeline,
        given,
        "vqvae",
        scheduler,
        batch_size=len(given.generators),
        eta=given.call.eta,
    )


def from_class(pipeline: Any, given: Given) -> torch.Tensor:
    generators, classes = given.generators, pipeline.transformer.config.num_embeds_ada_norm
    if is_guided(given.call):
        if classes != NULL_CLASS:
            raise ValueError(
                f"the model has {classes} classes, but guidance needs {NULL_CLASS}, since"
                f" DiTPipeline uses number {NULL_CLASS} for no class; set guidance_scale to 1"
            )
        generators = [*generators, *generators]  # both halves draw; the second half is dropped
    return kept_latents(
        pipeline,
        given,
        "vae",
        drawing_from(pipeline.scheduler, generators),
        class_labels=list(given.labels),
        guidance_scale=given.call.guidance_scale,
    )


def from_text(pipeline: Any, given: Given) -> torch.Tensor:
    factor = pipeline.vae_scale_factor
    with holding(pipeline, tokenizer=count_letters, bert=MadeEmbeddings(given)):
        return kept_latents(
            pipeline,
            given,
            "vqvae",
            drawing_from(pipeline.scheduler, given.generators),
            prompt=["a prompt"] * len(given.generators),
            guidance_scale=given.call.guidance_scale,
            eta=given.call.eta,
            # the pipeline divides the size by 8, whatever the VAE's factor
            width=given.call.width // factor * SIDE,
            height=given.call.height // factor * SIDE,
        )


def from_low(pipeline: Any, given: Given) -> torch.Tensor:
    import torch

    # As the pipeline converts a PIL image: on the CPU, with the channels last in memory.
    pixels = given.conditions["image"].cpu().numpy().astype("float32") / 255.0
    image = 2.0 * torch.from_numpy(pixels.transpose(0, 3, 1, 2)) - 1.0  # (B, 3, h, w)
    return kept_latents(
        pipeline,
        given,
        "vqvae",
        drawing_from(pipeline.scheduler, given.generators),
        image=image,
        eta=given.call.eta,
    )


def decode_vq(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    return decode_by(pipeline.vqvae, latents.to(pipeline.vqvae.dtype))


def decode_kl(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    return decode_by(pipeline.vae, latents)


def is_guided_by_text(call: Call) -> bool:
    """Whether guidance is on. As in LDMTextToImagePipeline, only a scale of 1 is off."""
    return call.guidance_scale != 1.0


# --- the catalogue -------------------------------------------------------------------------------

UNSCALED = (  # their first noise has a standard deviation of 1, which DiT and LDM with BERT need
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

_KEPT = "a substitute for the autoencoder receives the latents from the pipeline"

FAMILIES = (
    Family(
        name="ldm",
        task="unconditional",
        pipeline="LDMPipeline",
        saved_as=("LDMPipeline",),
        encoder=(),
        denoiser=("unet", "scheduler"),
        decoder=("vqvae",),
        approximations=("deep_cache",),
        adapter=Adapter(denoise=from_nothing, decode=decode_vq),
        split=f"nothing to encode; {_KEPT}",
        stubs=("vqvae",),
        vae="vqvae",
        guidance="none",
        settings=("eta",),
        fixed_size=True,
        external=("vqvae",),
        recommended=(50, 1.0),
    ),
    Family(
        name="dit",
        task="class-conditional",
        pipeline="DiTPipeline",
        saved_as=("DiTPipeline",),
        encoder=(),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        adapter=Adapter(denoise=from_class, decode=decode_kl),
        split=f"the transformer embeds the classes itself; {_KEPT}",
        size=("transformer", "sample_size"),
        guidance="null",
        fixed_size=True,
        schedulers=UNSCALED,
        guided_classes=NULL_CLASS,
        recommended=(50, 4.0),
    ),
    Family(
        name="ldm-class",
        task="class-conditional",
        pipeline="StableDiffusionPipeline",
        saved_as=("StableDiffusionPipeline",),
        encoder=("class_embedder",),
        denoiser=("unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(encode_label=encode_label, denoise=from_noise, decode=decode_scaled),
        split="by public arguments: the class's embedding as prompt_embeds in, latents out",
        null=(
            *("tokenizer", "text_encoder"),
            *("safety_checker", "feature_extractor", "image_encoder"),
        ),
        guidance="null",
        settings=("eta",),
        recommended=(50, 1.5),
    ),
    Family(
        name="ldm-bert",
        task="text-to-image",
        pipeline="LDMTextToImagePipeline",
        saved_as=("LDMTextToImagePipeline",),
        encoder=("tokenizer", "bert"),
        denoiser=("unet", "scheduler"),
        decoder=("vqvae",),
        approximations=("guidance_interval", "deep_cache"),
        adapter=Adapter(
            encode_prompt=encode_text,
            denoise=from_text,
            decode=decode_vq,
            guided=is_guided_by_text,
            tokenizers=(("tokenizer", TOKENS),),
        ),
        split=f"substitutes for tokenizer and BERT pass the embeddings in; {_KEPT}",
        stubs=("vqvae",),
        vae="vqvae",
        guidance="null",
        settings=("eta",),
        schedulers=UNSCALED,
        external=("vqvae",),
        recommended=(50, 6.0),
    ),
    Family(
        name="ldm-super-resolution",
        task="super-resolution",
        pipeline="LDMSuperResolutionPipeline",
        saved_as=("LDMSuperResolutionPipeline",),
        encoder=(),
        denoiser=("unet", "scheduler"),
        decoder=("vqvae",),
        approximations=("deep_cache",),
        adapter=Adapter(encode_images=encode_low, denoise=from_low, decode=decode_vq),
        split=f"the small image goes to the U-Net as 8-bit pixels; {_KEPT}",
        stubs=("vqvae",),
        vae="vqvae",
        channels=((2, 0),),
        image_latent_channels=3,
        upscale=0,
        guidance="none",
        settings=("eta",),
        multiple_of=32,  # the pipeline rounds the small image's sides down to multiples of 32
        external=("vqvae",),
        recommended=(100, 1.0),
    ),
)
