"""Functions shared by the adapters of several families: call arguments, image latents, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Given, ImageInputs
from batchgen.records import Call

if TYPE_CHECKING:
    import numpy as np
    import torch


def call_pipeline(pipeline: Any, given: Given, **more: Any) -> torch.Tensor:
    """Call the pipeline and return its latents; passes the arguments that all pipelines share.

    ``more`` is added and wins. Tensors of negative prompts get the prefix ``negative_``, as in
    every diffusers pipeline.
    """
    arguments: dict[str, Any] = {
        **given.prompts,
        **{f"negative_{name}": tensor for name, tensor in given.negatives.items()},
        "num_inference_steps": given.call.num_inference_steps,
        "guidance_scale": given.call.guidance_scale,
        "generator": given.generators,
        "output_type": "latent",
        "return_dict": False,
        **more,
    }
    latents: torch.Tensor = pipeline(**arguments)[0]
    return latents


def device_of(pipeline: Any) -> Any:
    """The torch device on which the pipeline's models run.

    The weights need not be there: ``models.offload`` keeps them in host memory, and then
    ``pipeline.device`` and the ``device`` of a text encoder tell the CPU.
    """
    return pipeline._execution_device


def size_of(call: Call) -> dict[str, int]:
    """Return ``width`` and ``height`` as arguments."""
    return {"width": call.width, "height": call.height}


def require_steps(call: Call) -> None:
    """Refuse a strength that leaves no step; the libraries would fail with an unclear message."""
    if int(call.num_inference_steps * (call.strength or 0.0)) < 1:
        raise ValueError(
            f"strength {call.strength} of {call.num_inference_steps} steps leaves no step; use a "
            "larger strength or more steps"
        )


def decode_scaled(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Decode latents with the VAE, after undoing its scaling and shift."""
    return decode_by(pipeline.vae, unscaled(latents, pipeline.vae.config))


def decode_by(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode unscaled latents (B, C, h, w) to (B, 3, H, W)."""
    decoded: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return decoded


def unscaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Undo the VAE's scaling factor, and its shift if it has one."""
    plain: torch.Tensor = latents / config.scaling_factor
    shift = getattr(config, "shift_factor", None)
    return plain if shift is None else plain + shift


def pixels_of(pipeline: Any, image: np.ndarray[Any, Any]) -> torch.Tensor:
    """Convert one uint8 RGB image to (1, 3, H, W) in [-1, 1], with the pipeline's own processor."""
    pixels: torch.Tensor = pipeline.image_processor.preprocess(
        image[None].astype("float32") / 255.0
    )
    return pixels


def posteriors(pipeline: Any, images: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    """Encode images to posteriors one by one; variants of a row share their array, and one result.

    A plain pipeline that gets a list of generators also encodes its images one by one.
    """
    vae = pipeline.vae
    known: dict[int, Any] = {}
    for image in images:
        if id(image) not in known:
            pixels = pixels_of(pipeline, image).to(device_of(pipeline), vae.dtype)
            known[id(image)] = vae.encode(pixels).latent_dist
    return [known[id(image)] for image in images]


def shifted_source(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``image``: (n, C, H/f, W/f) latents drawn from each posterior, shifted and scaled."""
    import torch

    drawn = [
        posterior.sample(generator)
        for posterior, generator in zip(
            posteriors(pipeline, inputs.images["image"]), inputs.generators, strict=True
        )
    ]
    config = pipeline.vae.config
    return {"image": (torch.cat(drawn) - (config.shift_factor or 0.0)) * config.scaling_factor}


def known_posterior(moments: torch.Tensor) -> SimpleNamespace:
    """Make the result of a VAE's ``encode`` from moments (B, 2C, h, w) of the encode stage."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))


def filled_images(inputs: ImageInputs, part: str) -> list[np.ndarray[Any, Any]]:
    """Pad the images of a part to B with the first one, for pipelines that encode all at once."""
    images = inputs.images[part]
    return [*images, *[images[0]] * (inputs.batch_size - len(images))]
