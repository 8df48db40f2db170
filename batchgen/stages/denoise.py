"""The denoise stage: noise becomes latents, by the model's own diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchgen.families.adapter import Adapter, Given
from batchgen.records import Call, EncodedBatch, LatentBatch


class Denoiser:
    """U-Net or transformer, and scheduler, always run at one fixed batch size.

    A short batch is filled with dummy samples that copy the first sample's conditions and draw from
    generators of their own, so a sample's latents depend neither on its neighbours, nor on its
    place, nor on how full the batch is.

    Not safe for two threads at a time (a scheduler counts its steps).

    Args:
        pipeline: a diffusers pipeline that holds the denoising parts only, in ``eval()``.
        adapter: how such a pipeline is called.
        batch_size: samples a library call.
        switch: brings the pipeline to what a call asks for (its LoRAs, its scheduler), before every
            call.
    """

    def __init__(
        self,
        pipeline: Any,
        adapter: Adapter,
        batch_size: int,
        switch: Callable[[Any, Call], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.adapter = adapter
        self.batch_size = batch_size
        self._switch = switch

    @torch.no_grad()
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        """Denoise one micro-batch; the latents stay on the stage's device.

        Raises:
            ValueError: more samples than the batch size, or a strength that leaves no step.
            torch.OutOfMemoryError: the batch size is too large for the device.
        """
        if self._switch is not None:
            self._switch(self.pipeline, batch.call)
        count = len(batch.generator_states)
        rows = filled(count, self.batch_size)
        given = Given(
            call=batch.call,
            prompts=self._chosen(batch, batch.prompt_index, rows),
            negatives=self._chosen(batch, batch.negative_index or (), rows),
            conditions={
                name: tensor[rows].to(self.pipeline.device)
                for name, tensor in batch.conditions.items()
            },
            labels=[batch.labels[row] for row in rows] if batch.labels else (),
            generators=restored_generators(batch.generator_states, self.batch_size),
        )
        latents = self.adapter.denoise(self.pipeline, given)  # (B, ...)
        return LatentBatch(batch.call, latents[:count], batch.truncated)

    def _chosen(
        self, batch: EncodedBatch, index: tuple[int, ...], rows: list[int]
    ) -> dict[str, torch.Tensor]:
        """name -> (B, ...): each sample's own prompt of the unique ones."""
        if not index:
            return {}
        chosen = [index[row] for row in rows]
        device = self.pipeline.device
        return {name: tensor.to(device)[chosen] for name, tensor in batch.prompts.items()}


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
