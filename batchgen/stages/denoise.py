"""The denoise stage: turns noise into latents with the model's own diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import device_of
from batchgen.records import Call, EncodedBatch, LatentBatch


class Denoiser:
    """U-Net or transformer with its scheduler, always called with one fixed batch size.

    A short batch is filled with dummy samples, which copy the first sample's conditions and have
    their own generators. So a sample's latents do not depend on its neighbours, its position or
    the number of real samples in the batch.

    Not thread-safe, since a scheduler counts its steps.

    Args:
        pipeline: a diffusers pipeline that holds only the denoising parts, in ``eval()``.
        adapter: how such a pipeline is called.
        batch_size: number of samples in each library call.
        switch: called before each call, to activate its LoRAs and scheduler in the pipeline.
        compiled: the model is compiled, for tensors of one layout in memory. Without that they keep
            the layout of the plain pipeline, since another one may round differently.
    """

    def __init__(
        self,
        pipeline: Any,
        adapter: Adapter,
        batch_size: int,
        switch: Callable[[Any, Call], None] | None = None,
        compiled: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.adapter = adapter
        self.batch_size = batch_size
        self._switch = switch
        self._compiled = compiled

    @torch.no_grad()
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        """Denoise one micro-batch; the latents stay on the stage's device.

        Raises:
            ValueError: more samples than the batch size, or a strength too low for any step.
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
                name: chosen_rows(tensor.to(device_of(self.pipeline)), rows, self._compiled)
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
        """name -> (B, ...): for each sample, its prompt among the unique prompts."""
        if not index:
            return {}
        chosen = [index[row] for row in rows]
        device = device_of(self.pipeline)
        return {
            name: chosen_rows(tensor.to(device), chosen, self._compiled)
            for name, tensor in batch.prompts.items()
        }


def chosen_rows(
    tensor: torch.Tensor, rows: Sequence[int], contiguous: bool = False
) -> torch.Tensor:
    """``tensor[rows]``, without a copy of the indices to the device, for which the host waits.

    With ``contiguous`` its numbers are in the order in which they arrive from another pool.
    """
    if list(rows) != list(range(len(tensor))):
        tensor = torch.cat([tensor[row : row + 1] for row in rows])
    return tensor.contiguous() if contiguous else tensor


def filled(count: int, batch_size: int) -> list[int]:
    """Row numbers of a full batch: the ``count`` real rows, then the first row as padding.

    Raises:
        ValueError: no row, or more rows than ``batch_size``.
    """
    if not 1 <= count <= batch_size:
        raise ValueError(f"got {count} samples for a batch size of {batch_size}")
    return [*range(count), *[0] * (batch_size - count)]


def restored_generators(states: torch.Tensor, batch_size: int) -> list[torch.Generator]:
    """One CPU generator per row: real rows continue from their states, dummies have seed zero.

    Args:
        states: (n, 5056) uint8 on the CPU, n <= ``batch_size``.
    """
    generators = [torch.Generator("cpu").manual_seed(0) for _ in range(batch_size)]
    for generator, state in zip(generators, states, strict=False):
        # set_state crashes on a view into a larger tensor (torch 2.13), so the state is cloned.
        generator.set_state(state.clone())
    return generators
