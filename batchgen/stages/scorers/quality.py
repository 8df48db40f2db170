"""A scorer: brightness and sharpness, and whether an image is blank, dark or blurred."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
TINY = 1e-6  # variance of an image without contrast
BRIGHTEST = 0.99  # an image is dark if this share of its pixels is


@dataclass(frozen=True)
class Quality:
    """Measures each image at its own size, in 8-bit levels.

    Attributes:
        blank_below: see ``spec.score_section.QualityOptions``, as for the others.
    """

    blank_below: float
    dark_below: float
    blurred_below: float

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        blank, dark, blurred = self.blank_below, self.dark_below, self.blurred_below
        return (
            ScoreColumn("brightness", pa.float32(), "mean luma, 0 to 255"),
            ScoreColumn("sharpness", pa.float32(), "variance of the Laplacian of the luma"),
            ScoreColumn(
                "relative_sharpness",
                pa.float32(),
                "sharpness over the variance of the luma, so that contrast does not count",
            ),
            ScoreColumn(
                "is_blank",
                pa.bool_(),
                f"the standard deviation of every channel is below {blank:g}",
            ),
            ScoreColumn("is_dark", pa.bool_(), f"99 of 100 pixels have a luma below {dark:g}"),
            ScoreColumn("is_blurred", pa.bool_(), f"the relative sharpness is below {blurred:g}"),
        )

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def compares(self) -> bool:
        return False

    @property
    def fingerprint(self) -> str:
        return f"quality/1 {asdict(self)}"

    def __call__(self, images: Scored) -> Scores:
        lumas = [_luma(pixels) for pixels in images.pixels]
        sharpness = [_sharpness(luma) for luma in lumas]
        pairs = zip(sharpness, lumas, strict=True)
        relative = [one / max(float(luma.var()), TINY) for one, luma in pairs]
        return {
            "brightness": [float(np.float32(luma.mean())) for luma in lumas],
            "sharpness": [float(np.float32(one)) for one in sharpness],
            "relative_sharpness": [float(np.float32(one)) for one in relative],
            "is_blank": [self._is_blank(pixels) for pixels in images.pixels],
            "is_dark": [bool(np.quantile(luma, BRIGHTEST) < self.dark_below) for luma in lumas],
            "is_blurred": [one < self.blurred_below for one in relative],
        }

    def _is_blank(self, pixels: Array) -> bool:
        return bool((pixels.std(axis=(0, 1), dtype=np.float64) < self.blank_below).all())


def _luma(pixels: Array) -> Array:
    """Brightness of an image (height, width, 3) as float64 (height, width)."""
    red, green, blue = (pixels[..., channel] * weight for channel, weight in enumerate(LUMA))
    luma: Array = red + green + blue
    return luma


def _sharpness(luma: Array) -> float:
    """Variance of the Laplacian inside the border; 0 for an image without an inside."""
    if min(luma.shape) < 3:
        return 0.0
    beside = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((beside - 4.0 * luma[1:-1, 1:-1]).var())
