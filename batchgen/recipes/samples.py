"""The samples of a batch of rows: their keys, and the values that their columns are made of."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchgen.errors import SpecError
from batchgen.plan.columns import python_values
from batchgen.plan.keys import safe_key
from batchgen.recipes.classes import Classes
from batchgen.recipes.counting import with_names
from batchgen.recipes.reasons import Refused
from batchgen.recipes.recipe import Recipe
from batchgen.recipes.sources import Batch

MOST = 8192  # samples in memory at a time
MOST_BYTES = 64 << 20
TEMPLATE = "template"
_LONGEST_KEY = 100


@dataclass(frozen=True)
class Combination:
    """One of the combinations of all fields with ``each``, and what it adds to a key."""

    values: Mapping[str, Any]
    tail: str


def combinations(recipe: Recipe) -> list[Combination]:
    """List the combinations of the exhaustive fields, in their order; one if there are none.

    Raises:
        SpecError: there are too many, or two would give the same key.
    """
    lists = {
        name: list(drawn.each or ())
        for name, drawn in recipe.all_fields().items()
        if drawn.way == "each"
    }
    if recipe.each_template:
        lists[TEMPLATE] = list(recipe.templates)
    count = 1
    for values in lists.values():
        count *= len(values)
    if count > 100_000:
        raise SpecError("fields", "", "up to 100,000", said=f"each: {count:,} combinations")
    made = []
    for chosen in itertools.product(*lists.values()):
        tail = "".join(f"-{safe_key(str(one))}" for one in chosen)
        made.append(Combination(dict(zip(lists, chosen, strict=True)), tail))
    if len({one.tail for one in made}) < len(made):
        allowed = "values that give different keys"
        raise SpecError("fields", "", allowed, said="two combinations of `each` have one key")
    return made


@dataclass
class Samples:
    """Some samples of one batch of rows.

    Attributes:
        recipe: what they are made by.
        batch: the rows.
        classes: the table of classes.
        combos: the combinations of exhaustive fields.
        rows: the number of each sample's row in the batch.
        variants: its variant.
        combo: the number of its combination.
        made: the columns that exist already.
        refused: number of a sample -> why it cannot be made.
    """

    recipe: Recipe
    batch: Batch
    classes: Classes
    combos: Sequence[Combination]
    rows: npt.NDArray[np.int64]
    variants: npt.NDArray[np.int64]
    combo: npt.NDArray[np.int64]
    made: dict[str, pa.Array] = field(default_factory=dict)
    refused: dict[int, Refused] = field(default_factory=dict)
    _lists: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def row_keys(self) -> list[str]:
        """The key of each sample's row."""
        keys = self.batch.keys
        return [keys[row] or "" for row in self.rows.tolist()]

    @cached_property
    def draw_keys(self) -> list[bytes]:
        """The text that everything of a sample is drawn from: row key and variant.

        Exhaustive fields are not in it, so that such a field changes no drawn value.
        """
        pairs = zip(self.row_keys, self.variants.tolist(), strict=True)
        return [f"{key}-v{variant}".encode() for key, variant in pairs]

    @cached_property
    def keys(self) -> list[str]:
        """The samples' own keys: row key, exhaustive values, variant."""
        tails = [one.tail for one in self.combos]
        every = zip(self.row_keys, self.combo.tolist(), self.variants.tolist(), strict=True)
        return [sample_key(f"{key}{tails[combo]}", variant) for key, combo, variant in every]

    def refuse(self, sample: int, why: Refused) -> None:
        """Reject a sample; the first reason counts."""
        self.refused.setdefault(sample, why)

    def add(self, name: str, column: pa.Array) -> None:
        """Add a column; fields and templates after it can read it."""
        self.made[name] = column
        self._lists.pop(name, None)

    def has(self, name: str) -> bool:
        own = ("class", "key")
        return name in self.made or name in self.batch.table.column_names or name in own

    def values(self, name: str) -> list[Any]:
        """The value of each sample: of a column made already, else of its row.

        ``class`` is the class of its label; ``key`` the key of its row.
        """
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = self._values(name)
        return found

    def _values(self, name: str) -> list[Any]:
        if name in self.made:
            values: list[Any] = self.made[name].to_pylist()
            return values
        if name == "key":
            return list(self.row_keys)
        if name == "class" and "class" not in self.batch.table.column_names:
            of_rows = self.class_of_rows
        else:
            of_rows = row_values(self.batch, name)
        return [of_rows[row] for row in self.rows.tolist()]

    @property
    def class_of_rows(self) -> list[Any]:
        """The class of each row of the batch; None for those that have none."""
        label = self.recipe.label
        if label not in self.batch.table.column_names:
            return [None] * self.batch.table.num_rows
        classes = []
        for one in row_values(self.batch, label):
            try:
                classes.append(self.classes.of(one))
            except (Refused, TypeError):
                classes.append(None)
        return classes

    def taken(self, name: str) -> pa.Array:
        """The column of the source, once for each sample."""
        column = self.batch.table.column(name).combine_chunks()
        return column.take(pa.array(self.rows))


def row_values(batch: Batch, name: str) -> list[Any]:
    """The values of a column of a batch; text that is not UTF-8 is bytes.

    Objects also have the names of their categories.
    """
    values = python_values(batch.table.column(name))
    if name not in batch.categories:
        return values
    return [with_names(one, batch.categories[name]) for one in values]


def sample_key(stem: str, variant: int) -> str:
    """Name a sample; long names are cut, and end in a part of their SHA-256."""
    key = f"{stem}-v{variant}"
    if len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(stem.encode()).hexdigest()[:20]
    return f"{stem[:60]}-{digest}-v{variant}"


def samples_of(
    recipe: Recipe,
    batch: Batch,
    classes: Classes,
    combos: Sequence[Combination],
    quotas: npt.NDArray[np.int64] | None,
    variants: tuple[int, int],
) -> Iterator[Samples]:
    """Divide the samples of a batch into groups that fit into memory.

    Args:
        recipe: what to make.
        batch: the rows.
        classes: the table of classes.
        combos: all combinations of exhaustive fields.
        quotas: number of samples of each row; None: all variants and combinations.
        variants: the first variant to make, and one past the last.
    """
    first, stop = variants
    count = len(combos)
    rows: npt.NDArray[np.int64]
    if quotas is None:
        each = (stop - first) * count
        rows = np.repeat(np.arange(batch.table.num_rows), each)
        units = np.tile(np.arange(first * count, stop * count), batch.table.num_rows)
    else:
        clipped = np.clip(quotas, 0, stop * count)
        sizes = np.maximum(clipped - first * count, 0)
        rows = np.repeat(np.arange(batch.table.num_rows), sizes)
        begins = np.repeat(np.cumsum(sizes) - sizes, sizes)
        units = np.arange(len(rows)) - begins + first * count
    step = _step(batch)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield Samples(
            recipe, batch, classes, combos, rows[part], units[part] // count, units[part] % count
        )


def _step(batch: Batch) -> int:
    """Number of samples that fit into memory with what they carry from their rows."""
    rows = max(1, batch.table.num_rows)
    return int(max(1, min(MOST, MOST_BYTES * rows // max(1, batch.table.nbytes))))
