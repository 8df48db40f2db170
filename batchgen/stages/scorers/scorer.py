"""The interface of a scorer, which computes scores of images as columns that it names itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ScoreColumn:
    """A column of the output that a scorer fills: its name, its type and its meaning."""

    name: str
    kind: pa.DataType
    about: str


@dataclass(frozen=True)
class Scored:
    """The images of n samples that are scored together.

    Attributes:
        pixels: n images, uint8 RGB (height, width, 3); they may differ in size.
        rows: column of the output -> n values, for the columns that the scorers read.
        sources: n conditioning images as the model got them, uint8 RGB (height, width, 3); empty
            if no scorer compares with them. None for a sample that has none.
    """

    pixels: Sequence[Array]
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sources: Sequence[Array | None] = ()


# Name -> n values: the columns, and figures that only filters read. A value may be None or a list.
Scores = Mapping[str, Sequence[Any] | Array]


class Scorer(Protocol):
    """Scores images. It is called from several threads, and never under the device lock.

    Attributes:
        columns: the columns of the output that it fills.
        reads: the columns of the output that it reads, such as ``prompt``.
        compares: whether it reads the conditioning images.
        fingerprint: of its model and settings: two scorers with the same one give the same scores.
    """

    @property
    def columns(self) -> tuple[ScoreColumn, ...]: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def compares(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, images: Scored) -> Scores:
        """Score the images. An image's scores do not depend on the others in the call."""
        ...
