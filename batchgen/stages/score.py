"""The score stage: computes simple measures of each image, by which images can be filtered."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def score(pixels: Array) -> dict[str, Array]:
    """Scores of uint8 images (n, H, W, 3), one entry per image.

    Returns:
        ``pixel_mean``, ``pixel_std``: (n,) float32 over pixels and channels, in 8-bit levels.
        ``is_flat``: (n,) bool, every pixel has the same colour.
    """
    flat = pixels.reshape(len(pixels), -1)  # (n, H*W*3)
    colours = pixels.reshape(len(pixels), -1, pixels.shape[-1])  # (n, H*W, 3)
    return {
        "pixel_mean": flat.mean(axis=1, dtype=np.float64).astype(np.float32),
        "pixel_std": flat.std(axis=1, dtype=np.float64).astype(np.float32),
        "is_flat": (colours == colours[:, :1]).all(axis=(1, 2)),
    }
