"""What a scorer is: figures of each image of a micro-batch, as columns that it names itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchgen.records import ImageBatch, Sample

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ScoreColumn:
    """A column of the output that a scorer fills: its name, its type, and what it means."""

    name: str
    kind: pa.DataType
    about: str


@dataclass(frozen=True)
class Scores:
    """The scores of a micro-batch of n images.

    Attributes:
        columns: name -> (n,), one for each column of the scorer.
        flags: reason of rejection -> (n,) bool, true where an image is unfit for this reason. The
            policy decides whether it is rejected.
    """

    columns: Mapping[str, Array]
    flags: Mapping[str, Array] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores images. It is called from several threads, and never under the device lock."""

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        """The columns of the output that it fills."""
        ...

    def __call__(self, samples: Sequence[Sample], batch: ImageBatch) -> Scores:
        """Scores of ``batch.pixels`` (n, H, W, 3), uint8, of these n samples.

        An image's scores do not depend on its neighbours in the micro-batch.
        """
        ...
