"""A scorer: mean and standard deviation of the pixels, and whether all have the same colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from batchgen.records import ImageBatch, Sample
from batchgen.stages.scorers.scorer import ScoreColumn, Scores


class PixelStatistics:
    """Scores in 8-bit levels, over pixels and channels of each image."""

    columns = (
        ScoreColumn("pixel_mean", pa.float32(), "mean of the pixel values, 0 to 255"),
        ScoreColumn("pixel_std", pa.float32(), "standard deviation of the pixel values"),
    )

    def __call__(self, samples: Sequence[Sample], batch: ImageBatch) -> Scores:
        pixels = batch.pixels
        flat = pixels.reshape(len(pixels), -1)  # (n, H*W*3)
        colours = pixels.reshape(len(pixels), -1, pixels.shape[-1])  # (n, H*W, 3)
        return {
            "pixel_mean": flat.mean(axis=1, dtype=np.float64).astype(np.float32),
            "pixel_std": flat.std(axis=1, dtype=np.float64).astype(np.float32),
            "is_flat": (colours == colours[:, :1]).all(axis=(1, 2)),
        }
