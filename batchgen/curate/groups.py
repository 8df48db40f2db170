"""Groups and cells of input rows, by the values of their columns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from batchgen.errors import SpecError, nearest
from batchgen.plan.columns import plain_type, python_values
from batchgen.plan.plan import COUNTED_COLUMN, Plan
from batchgen.spec.splits import is_wanted
from batchgen.storage import open_input

Array = np.ndarray[Any, Any]
Values = tuple[str | None, ...]  # of the columns that make a group
ALL = "all"  # the name of the only group, if there are no columns
NO_GROUP = -1


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each row.

    Attributes:
        names: of the groups, sorted.
        of_row: number of each row's group; NO_GROUP for rows that ``input.splits`` leaves out.
            Shape (rows,).
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
    kept, of_row = wanted_rows(plan, rows), np.full(rows, NO_GROUP, np.int32)
    if not columns:
        of_row[kept] = 0
        return Groups((ALL,), of_row)
    found = _values(plan, rows, columns)
    texts = [_texts([one[row] for row in np.flatnonzero(kept)], bins) for one in found]
    values = list(zip(*texts, strict=True))
    names = _names(sorted(set(values), key=_shown))
    numbers = {name: number for number, name in enumerate(sorted(names.values()))}
    of_row[kept] = [numbers[names[one]] for one in values]
    return Groups(tuple(numbers), of_row)


def wanted_rows(plan: Plan, rows: int) -> Array:
    """Which of the first rows of a plan's input have a split that ``input.splits`` lists."""
    source = plan.spec.input
    if source.splits is None or source.columns.split is None:
        return np.ones(rows, bool)
    (splits,) = _values(plan, rows, [source.columns.split])
    return np.array([is_wanted(one, source.splits) for one in splits], bool)


def _names(groups: Sequence[Values]) -> dict[Values, str]:
    """A name for each group: its values; with quotation marks where two would look alike."""
    plain = {values: _shown(values) for values in groups}
    often = Counter(plain.values())
    some = {values: name if often[name] == 1 else _quoted(values) for values, name in plain.items()}
    is_unique = len(set(some.values())) == len(some)
    return some if is_unique else {values: _quoted(values) for values in groups}


def _shown(values: Values) -> str:
    return ", ".join("null" if one is None else one for one in values)


def _quoted(values: Values) -> str:
    return ", ".join(
        "null" if one is None else json.dumps(one, ensure_ascii=False) for one in values
    )


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


def _texts(values: list[Any], bins: int | None) -> list[str | None]:
    """The value of each row as text; of numbers with many values, the bin."""
    numbers = [value for value in values if isinstance(value, int | float)]
    known = [value for value in numbers if not math.isnan(value)]
    is_number = len(numbers) == sum(value is not None for value in values)
    if bins is None or not is_number or len(set(known)) <= bins:
        return [None if value is None else str(value) for value in values]
    edges = np.quantile(np.array(known, np.float64), np.linspace(0, 1, bins + 1))[1:-1]

    def text(value: float | None) -> str | None:
        if value is None or math.isnan(value):
            return None if value is None else "nan"
        return f"bin {np.searchsorted(edges, value, side='right') + 1} of {bins}"

    return [text(value) for value in values]
