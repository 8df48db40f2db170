"""Scorers of a user's own, for tests: they write down which images they were called with."""

from __future__ import annotations

import os
import time
from typing import Any

import pyarrow as pa

from batchgen.stages.scorers.scorer import ScoreColumn, Scored, scores

LOG = "BATCHGEN_TEST_SCORER_LOG"
SECONDS = 0.4  # a call; a shard is one call


@scores(
    ScoreColumn("redness", pa.float32(), "mean of the red channel"),
    ScoreColumn("row", pa.int64(), "number of the row, from the key"),
    reads=("key",),
)
def counted(images: Scored) -> dict[str, list[Any]]:
    """Takes a while, and appends the keys it is called with to the file LOG."""
    keys = images.rows["key"]
    if LOG in os.environ:
        time.sleep(SECONDS)
        with open(os.environ[LOG], "a") as log:
            log.write("".join(f"{key}\n" for key in keys))
    return {
        "redness": [float(pixels[..., 0].mean()) for pixels in images.pixels],
        "row": [int(key.removesuffix("-v0").rpartition("-")[2]) for key in keys],
    }


@scores(ScoreColumn("area", pa.int32(), "number of pixels"), reads=("key",))
def fails_on_row_5(images: Scored) -> dict[str, list[Any]]:
    """Cannot score one of the samples."""
    if any("00000005" in key for key in images.rows["key"]):
        raise ValueError("row 5 cannot be scored")
    return {"area": [pixels.shape[0] * pixels.shape[1] for pixels in images.pixels]}
