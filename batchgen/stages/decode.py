"""The decode stage: turns latents into pixels."""

from __future__ import annotations

from typing import Any

import torch

from batchgen.families.adapter import Adapter
from batchgen.records import ImageBatch, LatentBatch
from batchgen.stages.denoise import chosen_rows, filled
from batchgen.stages.queue import Later, queue_of


class Decoder:
    """The decoding half of the VAE, always called with one fixed batch size.

    The device converts floats to 8 bit, with the arithmetic of diffusers' ``numpy_to_pil``: only
    bytes are copied to the host, and they equal those of the plain pipeline. The adapter decides
    whether a float16 VAE is upcast to float32 (``force_upcast``); overflow shows in ``finite``.

    Args:
        pipeline: a diffusers pipeline that holds only the autoencoder, in ``eval()``.
        adapter: how such a pipeline decodes.
        batch_size: number of samples in each call of the VAE.
    """

    def __init__(self, pipeline: Any, adapter: Adapter, batch_size: int) -> None:
        self.pipeline = pipeline
        self.adapter = adapter
        self.batch_size = batch_size
        self._queue = queue_of(str(pipeline.device))

    def __call__(self, batch: LatentBatch) -> ImageBatch:
        """Decode one micro-batch to uint8 RGB (n, height, width, 3) on the host."""
        return self.start(batch).result()

    @torch.no_grad()
    def start(self, batch: LatentBatch) -> Later[ImageBatch]:
        """Queue the decoding of one micro-batch and the copy of its images to the host.

        Pixels that are not a number become black, and ``finite`` is False for their sample.

        Raises:
            ValueError: more samples than the batch size.
            torch.OutOfMemoryError: the batch size is too large for the device.
        """
        count = len(batch.latents)
        rows = filled(count, self.batch_size)
        latents = chosen_rows(batch.latents.to(self.pipeline.device), rows)  # (B, ...)
        decoded = self.adapter.decode(self.pipeline, latents, batch.call)[:count]  # (n, 3, H, W)
        unit = (decoded / 2 + 0.5).clamp(0, 1)
        finite = torch.isfinite(decoded).flatten(1).all(dim=1)
        copied, judged = self._queue.to_host(to_bytes(unit)), self._queue.to_host(finite)

        def read() -> ImageBatch:
            return ImageBatch(copied.numpy(), tuple(judged.tolist()), batch.truncated)

        return Later(self._queue.mark(), read)


def to_bytes(unit: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) in [0, 1] of any float type to (n, H, W, 3) uint8, rounding half to even."""
    levels = (unit.float() * 255).round().nan_to_num(nan=0.0)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
