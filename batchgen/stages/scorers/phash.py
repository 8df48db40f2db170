"""A scorer: the perceptual hash of each image, by which near copies are found."""

from __future__ import annotations

import pyarrow as pa

from batchgen.images.perceptual_hash import perceptual_hash
from batchgen.stages.scorers.scorer import ScoreColumn, Scored, Scores


class PerceptualHash:
    """Near copies differ in few of the 64 bits."""

    columns = (
        ScoreColumn("phash", pa.uint64(), "perceptual hash, 64 bits; near copies differ in few"),
    )
    reads = ()
    compares = False
    fingerprint = "phash/1"

    def __call__(self, images: Scored) -> Scores:
        return {"phash": [perceptual_hash(pixels) for pixels in images.pixels]}
