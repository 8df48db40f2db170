"""Class balance: how many samples each row gets, so that each class reaches its target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchgen.errors import InputError
from batchgen.plan.columns import python_values
from batchgen.recipes.draws import Dice
from batchgen.recipes.recipe import Balance, Recipe
from batchgen.recipes.sources import Source

Counts = npt.NDArray[np.int64]
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Quotas:
    """Number of samples of each row of the source, in order; -1 if the class is null."""

    of_rows: Counts

    @property
    def total(self) -> int:
        return int(np.maximum(self.of_rows, 0).sum())


def quotas(recipe: Recipe, balance: Balance, source: Source) -> Quotas:
    """Count the rows of each class and divide its target among them.

    The rows of a class get the same number of samples, and some one more; which ones follows from
    their keys. The source is read once, only its classes and keys.

    Raises:
        InputError: there is no such column, or it has too many classes.
    """
    if balance.column not in source.schema.names:
        there = ", ".join(source.schema.names)
        raise InputError(f"balance.column: no column {balance.column!r}; there are: {there}")
    classes, words = _classes(recipe, balance, source)
    of_rows = np.full(len(classes), -1, dtype=np.int64)
    known = classes[classes >= 0]
    sizes = np.bincount(known) if len(known) else np.zeros(0, dtype=np.int64)
    target = int(sizes.max(initial=0)) if balance.target == "max" else balance.target
    order = np.lexsort((words, classes))  # the rows of a class together, by their words
    start = int((classes < 0).sum())
    for size in sizes.tolist():
        rows = order[start : start + size]
        start += size
        wanted = max(0, target - size) if balance.include_sources else target
        each, more = divmod(wanted, size)
        of_rows[rows] = each
        of_rows[rows[:more]] += 1
    return Quotas(of_rows)


def _classes(
    recipe: Recipe, balance: Balance, source: Source
) -> tuple[Counts, npt.NDArray[np.uint64]]:
    """Read the number of each row's class, -1 for null, and the row's word."""
    numbers: dict[Any, int] = {}
    dice = Dice(recipe.seed, "balance")
    classes, words = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
    for values, keys in _read(balance.column, source):
        found = [-1 if one is None else numbers.setdefault(one, len(numbers)) for one in values]
        if len(numbers) > MAX_CLASSES:
            raise InputError(f"balance.column: {balance.column!r} has over {MAX_CLASSES:,} classes")
        classes.append(np.array(found, dtype=np.int64))
        words.append(dice.words(keys))
    return np.concatenate(classes), np.concatenate(words)


def _read(column: str, source: Source) -> Iterator[tuple[list[Any], list[bytes]]]:
    for batch in source.batches([column]):
        values = python_values(batch.table.column(column))
        if any(isinstance(one, list | dict) for one in values):
            raise InputError(f"balance.column: {column!r} holds lists; needed: numbers or text")
        yield values, [(one or "").encode() for one in batch.keys]
