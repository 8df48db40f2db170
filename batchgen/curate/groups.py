"""Groups and cells of input rows, by the values of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from batchgen.errors import SpecError, nearest
from batchgen.plan.columns import plain_type, python_values
from batchgen.plan.plan import COUNTED_COLUMN, Plan
from batchgen.storage import open_input

Array = np.ndarray[Any, Any]
ALL = "all"  # the name of the only group, if there are no columns


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each row.

    Attributes:
        names: of the groups, sorted.
        of_row: number of each row's group; shape (rows,).
    """

    names: tuple[str, ...]
    of_row: Array


def source_column(plan: Plan, name: str, field: str) -> str:
    """The column of the input that a column of the rows is read from.

    Raises:
        SpecError: there is none; ``field`` of the spec named it.
    """
    mapped, columns = plan.spec.input.columns.mapped(), [column for column, _ in plan.columns]
    if name in mapped:
        return mapped[name]
    if name in columns:
        return name
    known = list(dict.fromkeys([*mapped, *columns]))
    unmapped = name in type(plan.spec.input.columns).model_fields
    hint = f"; map it with input.columns.{name}" if unmapped else ""
    allowed = f"columns of the rows: {', '.join(known)}{nearest(name, known)}{hint}"
    raise SpecError(field, name, allowed)


def groups_of(plan: Plan, rows: int, columns: Sequence[str], bins: int | None = None) -> Groups:
    """The groups of the first rows of a plan's input.

    Args:
        plan: a plan of the input.
        rows: their number.
        columns: of the input.
        bins: for columns of numbers with more different values: bins with equal numbers of rows.
    """
    if not columns:
        return Groups((ALL,), np.zeros(rows, np.int32))
    texts = [_texts(values, bins) for values in _values(plan, rows, columns)]
    named = [", ".join(parts) for parts in zip(*texts, strict=True)]
    names = sorted(set(named))
    numbers = {name: number for number, name in enumerate(names)}
    return Groups(tuple(names), np.array([numbers[name] for name in named], np.int32))


def _values(plan: Plan, rows: int, columns: Sequence[str]) -> list[list[Any]]:
    """The values of each column, in the order of the rows."""
    if plan.spec.input.count:
        return [list(range(rows)) for name in columns if name == COUNTED_COLUMN]
    found: list[list[Any]] = [[] for _ in columns]
    wanted = list(dict.fromkeys(columns))
    for file in plan.files:
        if len(found[0]) >= rows:
            break
        with open_input(file.path, plan.spec.input.path, file.etag) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            for batch in parquet.iter_batches(65_536, columns=wanted, use_threads=False):
                for values, name in zip(found, columns, strict=True):
                    column = batch.column(name)
                    values += python_values(column.cast(plain_type(column.type)))
    return [values[:rows] for values in found]


def _texts(values: list[Any], bins: int | None) -> list[str]:
    """The value of each row as text; of numbers with many values, the bin."""
    known = [value for value in values if isinstance(value, int | float) and value == value]
    is_number = len(known) == sum(value is not None for value in values)
    if bins is None or not is_number or len(set(known)) <= bins:
        return ["null" if value is None else str(value) for value in values]
    edges = np.quantile(np.array(known, np.float64), np.linspace(0, 1, bins + 1))[1:-1]
    places = np.searchsorted(edges, [0 if one is None else one for one in values], side="right")
    pairs = zip(values, places.tolist(), strict=True)
    return ["null" if value is None else f"bin {place + 1} of {bins}" for value, place in pairs]
