"""The denoise stage: noise becomes latents, by the model's own diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch

from batchgen.records import Call, EncodedBatch, LatentBatch


class Denoiser:
    """U-Net and scheduler, always run at one fixed batch size.

    A short batch is filled with dummy samples that copy the first sample's conditions and draw from
    generators of their own, so a sample's latents depend neither on its neighbours, nor on its
    place, nor on how full the batch is.

    Not safe for two threads at a time (a scheduler counts its steps).

    Args:
        pipeline: a ``StableDiffusionPipeline`` or, for image tasks, a
            ``StableDiffusionImg2ImgPipeline``, with U-Net and scheduler only, in ``eval()``.
        batch_size: samples a library call.
    """

    def __init__(
        self,
        pipeline: Any,
        batch_size: int,
    ) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        """Denoise one micro-batch; the latents stay on the stage's device.

        Raises:
            ValueError: more samples than the batch size, or a strength that leaves no step.
            torch.OutOfMemoryError: the batch size is too large for the device.
        """
        count = len(batch.prompt_index)
        rows = filled(count, self.batch_size)
        arguments: dict[str, Any] = {
            "prompt_embeds": self._embeds(batch, batch.prompt_index, rows),
            "generator": restored_generators(batch.generator_states, self.batch_size),
            "num_inference_steps": batch.call.num_inference_steps,
            "guidance_scale": batch.call.guidance_scale,
            "output_type": "latent",
            "return_dict": False,
        }
        if batch.negative_index is not None:
            arguments["negative_prompt_embeds"] = self._embeds(batch, batch.negative_index, rows)
        if batch.image_latents is None:
            arguments |= {"width": batch.call.width, "height": batch.call.height}
        else:
            _require_steps(batch.call)
            arguments["image"] = batch.image_latents[rows].to(self.pipeline.device)
            arguments["strength"] = batch.call.strength
        latents = self.pipeline(**arguments)[0]  # (B, C, H/f, W/f)
        return LatentBatch(batch.call, latents[:count], batch.truncated)

    def _embeds(self, batch: EncodedBatch, index: tuple[int, ...], rows: list[int]) -> torch.Tensor:
        embeds = batch.embeds.to(self.pipeline.device)
        return embeds[[index[row] for row in rows]]  # (B, T, D)


def filled(count: int, batch_size: int) -> list[int]:
    """Row numbers of a full batch: the ``count`` real rows, then the first again and again.

    Raises:
        ValueError: no row, or more rows than ``batch_size``.
    """
    if not 1 <= count <= batch_size:
        raise ValueError(f"{count} samples for a batch size of {batch_size}")
    return [*range(count), *[0] * (batch_size - count)]


def restored_generators(states: torch.Tensor, batch_size: int) -> list[torch.Generator]:
    """One CPU generator a row: the real rows go on from their states, dummies start at zero.

    Args:
        states: (n, 5056) uint8 on the CPU, n <= ``batch_size``.
    """
    generators = [torch.Generator("cpu").manual_seed(0) for _ in range(batch_size)]
    for generator, state in zip(generators, states, strict=False):
        # A row of a larger tensor crashes set_state (torch 2.13): give it storage of its own.
        generator.set_state(state.clone())
    return generators


def _require_steps(call: Call) -> None:
    if int(call.num_inference_steps * (call.strength or 0.0)) < 1:
        raise ValueError(
            f"strength {call.strength} of {call.num_inference_steps} steps leaves no step to make"
        )
