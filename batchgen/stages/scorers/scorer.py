"""The interface of a scorer, which computes scores of images as columns that it names itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchgen.records import ImageBatch, Sample

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ScoreColumn:
    """A column of the output that a scorer fills: its name, its type and its meaning."""

    name: str
    kind: pa.DataType
    about: str


Scores = Mapping[str, Array]  # name -> (n,): the columns, and figures that only filters read


class Scorer(Protocol):
    """Scores images. It is called from several threads, and never under the device lock."""

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        """The columns of the output that this scorer fills."""
        ...

    def __call__(self, samples: Sequence[Sample], batch: ImageBatch) -> Scores:
        """Score ``batch.pixels``, (n, H, W, 3) uint8, the images of these n samples.

        An image's scores do not depend on its neighbours in the micro-batch.
        """
        ...
