"""Resizes pixels to the size that a network reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]


def resized_to(pixels: Array, side: int) -> Array:
    """uint8 RGB (height, width, 3) to (side, side, 3), bicubic; the aspect ratio is not kept."""
    if pixels.shape[:2] == (side, side):
        return pixels
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)
