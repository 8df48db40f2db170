"""The splits of an input: which column says them, and what a user should know about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, SpecError
from batchgen.spec.spec import Spec
from batchgen.spec.splits import is_held_out
from batchgen.storage import open_input

if TYPE_CHECKING:
    from batchgen.plan.plan import Plan

SPLIT = "split"


def with_split_column(spec: Spec, schema: pa.Schema, path: str) -> Spec:
    """The spec with the column of the splits, if ``input.splits`` asks for some.

    Raises:
        InputError: the input has no such column.
        SpecError: a column is named, but no splits.
    """
    source = spec.input
    if source.splits is None:
        if source.columns.split is not None:
            because = "input.splits is not set; list there which splits the run reads"
            raise SpecError("input.columns.split", source.columns.split, "", because=because)
        return spec
    if source.columns.split is not None:
        return spec
    if SPLIT not in schema.names:
        raise InputError(
            f"input.splits: {path} has no column {SPLIT!r}; name the column in "
            f"input.columns.split; the columns are {', '.join(schema.names)}"
        )
    columns = source.columns.model_copy(update={"split": SPLIT})
    return spec.model_copy(update={"input": source.model_copy(update={"columns": columns})})


def split_notes(plan: Plan) -> Iterator[str]:
    """What a user should know before a run whose input has rows that are held out."""
    names = {name: kind for name, kind in plan.columns}
    if plan.spec.input.splits is not None or names.get(SPLIT) not in ("string", "large_string"):
        return
    counts = Counter[str]()
    for file in plan.files:
        counts.update(_counts(file.path, plan.spec.input.path, file.etag))
    held_out = {name: count for name, count in sorted(counts.items()) if is_held_out(name)}
    if held_out and len(held_out) < len(counts):
        told = ", ".join(f"{count:,} of {name}" for name, count in held_out.items())
        yield (
            f"column {SPLIT!r} has rows that are held out ({told}), and the run reads them as "
            "well; --set 'input.splits=[train]' leaves them out"
        )


def _counts(path: str, url: str, etag: str) -> Counter[str]:
    """The splits of a file; none if it cannot be read, which the run reports."""
    try:
        with open_input(path, url, etag) as file:
            table = pq.ParquetFile(file, pre_buffer=False).read([SPLIT], use_threads=False)
    except (InputError, pa.ArrowException, OSError):
        return Counter()
    found = pc.value_counts(table.column(SPLIT)).to_pylist()
    return Counter({one["values"]: one["counts"] for one in found if one["values"] is not None})
