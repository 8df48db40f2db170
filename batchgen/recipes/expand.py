"""Expands a recipe: reads the rows, makes one row for each sample, and writes them to Parquet."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.recipes.asking import Answerer, Answers
from batchgen.recipes.balance import Quotas, quotas
from batchgen.recipes.classes import Classes
from batchgen.recipes.draws import Dice
from batchgen.recipes.makers import Makers, classes_and_source
from batchgen.recipes.reasons import Refused
from batchgen.recipes.recipe import RESERVED, Recipe, variant_range
from batchgen.recipes.samples import Samples, combinations, samples_of
from batchgen.recipes.sources import Batch
from batchgen.recipes.writing import REJECTS, RowWriter, rejects_name, schema_of, write_small
from batchgen.spec.tasks import LABEL_PARTS
from batchgen.storage import is_within

MAX_REJECTS = 100_000  # in the file of rejects; all are counted


@dataclass(frozen=True)
class Expanded:
    """What an expansion wrote.

    Attributes:
        output: the Parquet file.
        rejects: the file with the rejected samples; empty if there are none.
        rows: number of rows of the source.
        samples: number of samples that were written.
        rejected: number of samples that were rejected, by reason.
        asked: number of answers that a language model gave this time.
        columns: those of the file, in order.
    """

    output: str
    rejects: str
    rows: int
    samples: int
    rejected: Mapping[str, int]
    asked: int
    columns: tuple[str, ...]

    @property
    def rejected_fraction(self) -> float:
        rejected = sum(self.rejected.values())
        return rejected / max(1, rejected + self.samples)


@dataclass
class Expansion:
    """A recipe with everything that it needs, read and checked.

    Args:
        recipe: what to make.
        answers_path: the local file for answers of a language model.
        functions: functions that answer questions, by name.

    Raises:
        InputError, SpecError: the source, the classes, a wildcard or a template is wrong.
    """

    recipe: Recipe
    answers_path: str = ""
    functions: Mapping[str, Answerer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = Answers.read(self.answers_path) if self.answers_path else Answers("")
        self.classes, self.source = classes_and_source(self.recipe)
        self.combos = combinations(self.recipe)
        self.rejects: list[dict[str, Any]] = []
        self.rejected = Counter[str]()
        self.rows = 0
        self._key_words: list[Any] = []
        self._prepared = Makers(self.recipe, self.source, self.answers, self.functions)
        self._makers = self._prepared.all()

    def close(self) -> None:
        """Remove temporary files."""
        self._prepared.stack.close()

    def tables(
        self, variants: tuple[int, int] | None = None, limit: int | None = None
    ) -> Iterator[pa.Table]:
        """Make the accepted samples, in tables of bounded size.

        Args:
            variants: the first variant to make, and one past the last; None: those of the recipe.
            limit: make at most this number of samples.
        """
        given = self._quotas()
        stop = int(given.of_rows.max(initial=0)) // len(self.combos) + 1 if given else None
        span = variants or ((0, stop) if stop else variant_range(self.recipe.variants))
        left = limit
        for batch in self.source.batches():
            mine = None if given is None else given.of_rows[self.rows :][: batch.table.num_rows]
            self._see(batch, mine, span)
            parts = samples_of(self.recipe, batch, self.classes, self.combos, mine, span)
            for samples in parts:
                table = self._made(samples)
                table = table if left is None else table.slice(0, left)
                left = None if left is None else left - table.num_rows
                if table.num_rows:
                    yield table
                if left == 0:
                    return
        self._refuse_equal_keys()

    def carried(self) -> dict[str, str]:
        """Column of the source -> its name in the output, for those that are copied."""
        made = {*RESERVED, *self._written(), *self._of_another_image()}
        kept = {}
        for name in self.source.schema.names:
            if name == self.source.key_column or (name in made and name not in RESERVED):
                continue
            kept[name] = f"source_{name}" if name in RESERVED else name
        return kept

    def _of_another_image(self) -> set[str]:
        """Columns with labels of the pixels of an image that a pair replaces: they would lie."""
        parts = self.source.declared.parts
        if not {"image", parts.get("image")} & {pair.into for pair in self.recipe.pair}:
            return set()
        declared = {parts.get(part, part) for part in LABEL_PARTS}
        return {*declared, *LABEL_PARTS, *self.source.objects}

    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Column of class numbers that a pair makes -> the names of the classes."""
        names = self.source.declared.class_names(self.recipe.label)
        if names is None:
            return {}
        made = [f"{pair.into}_label" for pair in self.recipe.pair if pair.images is None]
        if any(pair.label == "source" for pair in self.recipe.pair):
            made.append(self.recipe.label)
        return dict.fromkeys(made, names)

    def schema(self, table: pa.Table) -> pa.Schema:
        """The schema of the output, with what its columns are."""
        return schema_of(table, self.source.declared, self.carried(), self.class_names())

    def _written(self) -> list[str]:
        """Names of the columns that the recipe makes."""
        names = ["prompt"] if self.recipe.templates else []
        names += list(self.recipe.all_fields())
        for pair in self.recipe.pair:
            names += [pair.into, f"{pair.into}_key", f"{pair.into}_label"]
            if pair.label == "source":
                names.append(self.recipe.label)
        return names

    def _quotas(self) -> Quotas | None:
        balance = self.recipe.balance
        return None if balance is None else quotas(self.recipe, balance, self.source)

    def _see(self, batch: Batch, mine: Any, span: tuple[int, int]) -> None:
        """Count the rows, reject those without a key or class, and remember the keys."""
        usual = (span[1] - span[0]) * len(self.combos)
        for number, key in enumerate(batch.keys):
            if key is None:
                self._reject(batch, number, Refused("null-key", "the key is null"), usual)
            elif mine is not None and mine[number] < 0:
                why = Refused("null-class", f"balance: {self.recipe.balance.column} is null")  # type: ignore[union-attr]
                self._reject(batch, number, why, 1)
        self.rows += batch.table.num_rows
        keys = [(one or batch.names[number]).encode() for number, one in enumerate(batch.keys)]
        self._key_words.append(_KEYS.words(keys))

    def _reject(self, batch: Batch, row: int, why: Refused, count: int, key: str = "") -> None:
        self.rejected[why.reason] += count
        if len(self.rejects) < MAX_REJECTS:
            facts = {"key": key or None, "row_key": batch.keys[row], "source": batch.names[row]}
            told = {"reason": why.reason, "message": str(why)[:1000], "samples": count}
            self.rejects.append({**facts, **told})

    def _refuse_equal_keys(self) -> None:
        """Refuse keys that occur twice: their samples would be the same.

        Raises:
            InputError: names both rows.
        """
        words = np.concatenate(self._key_words) if self._key_words else np.zeros(0)
        order = np.argsort(words, kind="stable")
        same = np.flatnonzero(words[order[1:]] == words[order[:-1]])
        if len(same):
            first, second = sorted(order[same[0] : same[0] + 2].tolist())
            raise InputError(
                f"key: rows {first} and {second} of {self.source.place} have the same key; keys "
                "must be unique, since everything is drawn from them"
            )

    def _made(self, samples: Samples) -> pa.Table:
        """Make all columns of some samples, and drop those that are rejected."""
        unnamed = [number for number, key in enumerate(samples.batch.keys) if key is None]
        if self.recipe.classes is not None:
            self._check_classes(samples)
        for maker in self._makers:
            maker.add_to(samples)
        columns = {
            "key": pa.array(samples.keys, pa.string()),
            "row_key": pa.array(samples.row_keys, pa.string()),
            "variant": pa.array(samples.variants, pa.int64()),
            **samples.made,
        }
        for name, shown in self.carried().items():
            if shown not in columns:
                columns[shown] = samples.taken(name)
        table = pa.table(columns)
        rows = samples.rows.tolist()
        for number, why in samples.refused.items():
            if rows[number] not in unnamed:
                self._reject(samples.batch, rows[number], why, 1, samples.keys[number])
        keep = np.ones(len(samples), dtype=bool)
        keep[list(samples.refused)] = False
        if unnamed:
            keep &= ~np.isin(samples.rows, unnamed)
        return table if keep.all() else table.filter(pa.array(keep))

    def _check_classes(self, samples: Samples) -> None:
        """Reject samples whose label is not in the table of classes."""
        label = self.recipe.label
        if not samples.has(label):
            raise InputError(
                f"label: there is no column {label!r} in {self.source.place} to join the classes by"
            )
        known: dict[Any, Refused | None] = {}
        for number, one in enumerate(samples.values(label)):
            if not isinstance(one, str | int | None):
                one = str(one)
            if one not in known:
                known[one] = _unknown(self.classes, one)
            why = known[one]
            if why is not None:
                samples.refuse(number, why)


_KEYS = Dice(0, "keys")


def expand(
    recipe: Recipe,
    output: str,
    variants: tuple[int, int] | None = None,
    limit: int | None = None,
    answers_path: str = "",
    functions: Mapping[str, Answerer] | None = None,
) -> Expanded:
    """Write one row for each sample of a recipe to a Parquet file.

    Args:
        recipe: what to make.
        output: path or URL of the file; a file that exists is replaced at the end.
        variants: the first variant to make, and one past the last; None: those of the recipe.
        limit: make at most this number of samples.
        answers_path: the local file for answers of a language model.
        functions: functions that answer questions, by name.

    Raises:
        InputError, SpecError: the recipe or its source is wrong, or no sample can be made.
    """
    writer = RowWriter.open(output)
    _refuse_own_source(recipe, output)
    with closing(Expansion(recipe, answers_path, functions or {})) as expansion:
        try:
            names = _write(writer, expansion, variants, limit)
        except BaseException:
            writer.abort()
            raise
        rejects = _write_rejects(writer, expansion)
        return Expanded(
            output,
            rejects,
            expansion.rows,
            writer.rows,
            dict(expansion.rejected),
            expansion.answers.asked,
            names,
        )


def _refuse_own_source(recipe: Recipe, output: str) -> None:
    """Refuse to write over what the recipe reads, or among it.

    Raises:
        InputError: names both.
    """
    for place in (recipe.source, *(pair.images for pair in recipe.pair)):
        if isinstance(place, str) and is_within(output, place):
            raise InputError(
                f"the output {output} is {place}, or is in it, which the recipe reads; choose "
                "another place"
            )


def _write(
    writer: RowWriter,
    expansion: Expansion,
    variants: tuple[int, int] | None,
    limit: int | None,
) -> tuple[str, ...]:
    schema = None
    for table in expansion.tables(variants, limit):
        if schema is None:
            schema = expansion.schema(table)
        writer.write(table.cast(schema))
    if schema is None:
        first = next(iter(expansion.rejects), None)
        if first is None:
            raise InputError(f"{expansion.source.place}: the recipe makes no samples of its rows")
        raise InputError(
            f"all samples were rejected; the first, of {first['source']}: {first['message']}"
        )
    writer.close()
    return tuple(schema.names)


def _write_rejects(writer: RowWriter, expansion: Expansion) -> str:
    name = rejects_name(writer.name)
    if not expansion.rejects:
        writer.store.delete(name)
        return ""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(expansion.rejects, REJECTS), sink, compression="zstd")
    write_small(writer.store, name, sink.getvalue().to_pybytes())
    return f"{writer.store.url}/{name}"


def preview(
    recipe: Recipe,
    count: int,
    variants: tuple[int, int] | None = None,
    answers_path: str = "",
    functions: Mapping[str, Answerer] | None = None,
) -> tuple[pa.Table, list[str]]:
    """Make the first samples of a recipe; writes nothing but answers of a language model.

    Returns the rows, and the names of the columns that are copied from the source.

    Raises:
        InputError, SpecError: the recipe or its source is wrong, or no sample can be made.
    """
    with closing(Expansion(recipe, answers_path, functions or {})) as expansion:
        tables = list(itertools.islice(expansion.tables(variants, count), count))
        if not tables:
            said = expansion.rejects[0]["message"] if expansion.rejects else "there are no rows"
            raise InputError(f"no sample can be made: {said}")
        schema = expansion.schema(tables[0])
        made = pa.concat_tables([one.cast(schema) for one in tables])
        return made, list(expansion.carried().values())


def _unknown(classes: Classes, label: Any) -> Refused | None:
    try:
        found = classes.of(label)
    except Refused as why:
        return why
    return Refused("null-class", "the label is null") if found is None else None
