"""The decode stage: turns latents into pixels."""

from __future__ import annotations

from typing import Any

import torch

from batchgen.families.adapter import Adapter
from batchgen.families.calls import device_of
from batchgen.records import ImageBatch, LatentBatch
from batchgen.stages.denoise import chosen_rows, filled
from batchgen.stages.queue import Later, queue_of


class Decoder:
    """The decoding half of the VAE, always called with one fixed batch size.

    A micro-batch of more samples is decoded in several calls. The last of them is filled with the
    micro-batch's first sample, so every call has the same shape.

    The device converts floats to 8 bit, with the arithmetic of diffusers' ``numpy_to_pil``: only
    bytes are copied to the host, and they equal those of the plain pipeline. The adapter decides
    whether a float16 VAE is upcast to float32 (``force_upcast``); overflow shows in ``finite``.

    Args:
        pipeline: a diffusers pipeline that holds only the autoencoder, in ``eval()``.
        adapter: how such a pipeline decodes.
        batch_size: number of samples in each call of the VAE, if a call of this stage names none.
        compiled: as of ``Denoiser``.
    """

    def __init__(
        self, pipeline: Any, adapter: Adapter, batch_size: int, compiled: bool = False
    ) -> None:
        self.pipeline = pipeline
        self.adapter = adapter
        self.batch_size = batch_size
        self._compiled = compiled
        self._queue = queue_of(str(device_of(pipeline)))

    def __call__(self, batch: LatentBatch) -> ImageBatch:
        """Decode one micro-batch to uint8 RGB (n, height, width, 3) on the host."""
        return self.start(batch).result()

    @torch.no_grad()
    def start(self, batch: LatentBatch, batch_size: int | None = None) -> Later[ImageBatch]:
        """Queue the decoding of one micro-batch and the copy of its images to the host.

        Pixels that are not a number become black, and ``finite`` is False for their sample.

        Args:
            batch: the latents.
            batch_size: number of samples in each call of the VAE, instead of the stage's own.

        Raises:
            ValueError: no sample.
            torch.OutOfMemoryError: the batch size is too large for the device.
        """
        size, count = batch_size or self.batch_size, len(batch.latents)
        rows = filled(count, -(-count // size) * size)
        slices = [rows[start : start + size] for start in range(0, len(rows), size)]
        decoded = [self._decode(batch, part) for part in slices]

        def read() -> ImageBatch:
            return ImageBatch(
                pixels=torch.cat([pixels for pixels, _ in decoded])[:count].numpy(),
                finite=tuple(torch.cat([finite for _, finite in decoded])[:count].tolist()),
                truncated=batch.truncated,
            )

        return Later(self._queue.mark(), read)

    def _decode(self, batch: LatentBatch, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode these rows in one call; (B, H, W, 3) uint8 and (B,) bool, to the host."""
        given = batch.latents.to(device_of(self.pipeline))
        latents = chosen_rows(given, rows, self._compiled)  # (B, ...)
        decoded = self.adapter.decode(self.pipeline, latents, batch.call)  # (B, 3, H, W)
        unit = (decoded / 2 + 0.5).clamp(0, 1)
        finite = torch.isfinite(decoded).flatten(1).all(dim=1)
        return self._queue.to_host(to_bytes(unit)), self._queue.to_host(finite)


def to_bytes(unit: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) in [0, 1] of any float type to (n, H, W, 3) uint8, rounding half to even."""
    levels = (unit.float() * 255).round().nan_to_num(nan=0.0)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
