"""The interface of a scorer, which computes scores of images as columns that it names itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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


_KINDS = {
    str(kind): kind
    for kind in (
        *(pa.bool_(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32()),
        *(pa.float64(), pa.string()),
    )
}
_LIST = re.compile(r"list<(\w+)>(?:\[(\d+)\])?")


def kind_text(kind: pa.DataType) -> str:
    """The type of a column of scores as text: ``float``, ``list<string>``, ``list<float>[512]``.

    Raises:
        ValueError: a column of scores cannot have this type.
    """
    text = str(kind)
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        size = f"[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else ""
        text = f"list<{kind.value_type}>{size}"
    if kind_named(text) is None:
        raise ValueError(f"the type {kind}; allowed: {', '.join(_KINDS)}, and lists of these")
    return text


def kind_named(text: str) -> pa.DataType | None:
    """The type with this text, see ``kind_text``; None if there is none."""
    found = _LIST.fullmatch(text)
    if found is None:
        return _KINDS.get(text)
    inner, size = _KINDS.get(found[1]), found[2]
    if inner is None:
        return None
    return pa.list_(inner, int(size)) if size else pa.list_(inner)


@dataclass(frozen=True)
class FunctionScorer:
    """A scorer that is a function, see ``scores``."""

    function: Callable[[Scored], Scores]
    columns: tuple[ScoreColumn, ...]
    reads: tuple[str, ...]
    compares: bool
    fingerprint: str

    def __call__(self, images: Scored) -> Scores:
        return self.function(images)


def scores(
    *columns: ScoreColumn, reads: Sequence[str] = (), compares: bool = False, version: str = "1"
) -> Callable[[Callable[[Scored], Scores]], FunctionScorer]:
    """Make a function a scorer: ``@scores(ScoreColumn("redness", pa.float32(), "mean of red"))``.

    Args:
        columns: the columns that it fills.
        reads: the columns of the output that it reads.
        compares: whether it reads the conditioning images.
        version: change it whenever the function gives other scores, so that outputs made before
            are not continued with it.
    """

    def made(function: Callable[[Scored], Scores]) -> FunctionScorer:
        name = f"{function.__module__}:{function.__qualname__}/{version}"
        return FunctionScorer(function, columns, tuple(reads), compares, name)

    return made
