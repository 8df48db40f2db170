"""Calls a scorer, and checks that it returns what it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from batchgen.errors import ModelError, OutOfMemory
from batchgen.stages.out_of_memory import is_out_of_memory
from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scorer


def called(scorer: Scorer, images: Scored) -> dict[str, Sequence[Any]]:
    """The columns of a scorer for some images, and its figures that only filters read.

    Raises:
        OutOfMemory: it ran out of memory.
        ModelError: a column is missing, has another number of values than there are images, or
            values of another type than the scorer names.
    """
    try:
        scores: Any = scorer(images)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory("score", str(error)) from error
        raise
    if not isinstance(scores, Mapping):
        raise ModelError(
            f"scorer {scorer.fingerprint} returned {type(scores).__name__}; needed: a mapping from "
            "columns to values"
        )
    found = {
        one.name: _column(scorer, one, scores.get(one.name), len(images.pixels))
        for one in scorer.columns
    }
    return found | {name: scores[name] for name in figures_of(scorer)}


def figures_of(scorer: Scorer) -> tuple[str, ...]:
    """The figures that a scorer returns beside its columns, for filters; most have none."""
    return tuple(getattr(scorer, "figures", ()))


def _column(scorer: Scorer, column: ScoreColumn, values: Any, count: int) -> Sequence[Any]:
    number = len(values) if hasattr(values, "__len__") else None
    if number != count:
        got = f"{number} values" if number is not None else "nothing"
        if number is None and values is not None:
            got = type(values).__name__
        raise ModelError(
            f"scorer {scorer.fingerprint} returned {got} of its column {column.name} for "
            f"{count} images; needed: one value for each image"
        )
    try:
        plain = [_plain(value) for value in values]
        _refuse_parts(column, plain)
        pa.array(plain, column.kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"scorer {scorer.fingerprint}: the values of its column {column.name} are not "
            f"of the type {column.kind} that it names: {error}"
        ) from error
    return plain


def _refuse_parts(column: ScoreColumn, values: Sequence[Any]) -> None:
    """Refuse numbers that a column of whole numbers would cut."""
    if pa.types.is_integer(column.kind):
        cut = [one for one in values if isinstance(one, float) and not one.is_integer()]
        if cut:
            raise ValueError(f"{cut[0]} is no whole number")


def _plain(value: Any) -> Any:
    """A score as a Python value."""
    return value.item() if isinstance(value, np.generic) else value


@overload
def read_only(pixels: Array) -> Array: ...


@overload
def read_only(pixels: None) -> None: ...


@overload
def read_only(pixels: Array | None) -> Array | None: ...


def read_only(pixels: Array | None) -> Array | None:
    """The same pixels as an array that a scorer cannot write to."""
    if pixels is None:
        return None
    seen = pixels.view()
    seen.flags.writeable = False
    return seen
