"""A scorer: mean and standard deviation of the pixels, and whether all have the same colour."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores

FLAT = "is_flat"


class PixelStatistics:
    """Scores in 8-bit levels, over pixels and channels of each image."""

    columns = (
        ScoreColumn("pixel_mean", pa.float32(), "mean of the pixel values, 0 to 255"),
        ScoreColumn("pixel_std", pa.float32(), "standard deviation of the pixel values"),
    )
    figures = (FLAT,)
    reads = ()
    compares = False
    fingerprint = "pixel-statistics/1"

    def __call__(self, images: Scored) -> Scores:
        return {
            "pixel_mean": [_rounded(pixels.mean(dtype=np.float64)) for pixels in images.pixels],
            "pixel_std": [_rounded(pixels.std(dtype=np.float64)) for pixels in images.pixels],
            FLAT: [_is_flat(pixels) for pixels in images.pixels],
        }


def _rounded(value: np.float64) -> float:
    return float(np.float32(value))


def _is_flat(pixels: Array) -> bool:
    """Whether all pixels of the image (height, width, 3) have the same colour."""
    return bool((pixels == pixels[:1, :1]).all())
