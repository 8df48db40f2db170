"""The scorers of a job as its plan has them, and what they are checked against before work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, PlanChanged
from batchgen.labels.columns import object_fields
from batchgen.plan.columns import plain_type, python_values
from batchgen.plan.plan import COUNTED_COLUMN, Plan
from batchgen.spec.score_section import ScorerSpec
from batchgen.spec.spec import Spec
from batchgen.stages.scorers import choose
from batchgen.stages.scorers.scorer import ScoreColumn, kind_named
from batchgen.storage import open_input

MOST_LABELS = 100_000  # more different labels are no classes


def score_columns(spec: Spec) -> tuple[ScoreColumn, ...]:
    """The columns of an output that scorers fill, in its order; of a spec as it was planned."""
    return (*choose.score_columns(spec.scorers), *settled_columns(spec.score))


def settled_columns(specs: Iterable[ScorerSpec]) -> tuple[ScoreColumn, ...]:
    """The columns that these scorers fill, as planning settled them."""
    return tuple(
        ScoreColumn(name, kind_named(kind) or pa.null(), one.settled.about.get(name, ""))
        for one in specs
        if one.settled is not None
        for name, kind in one.settled.columns.items()
    )


def keep_settled(spec: Spec, saved: Plan | None) -> Spec:
    """The spec with its scorers as the plan of the output has them, if they are the same.

    So a scorer from the hub keeps its commit.
    """
    if saved is None or len(saved.spec.score) != len(spec.score):
        return spec
    pairs = zip(spec.score, saved.spec.score, strict=True)
    kept = tuple(planned if asked.asks_for(planned) else asked for asked, planned in pairs)
    return spec.model_copy(update={"score": kept})


def compare_scorers(saved: Sequence[ScorerSpec], now: Sequence[ScorerSpec]) -> None:
    """Refuse to continue an output with other scorers than it was planned with.

    Raises:
        PlanChanged: the first scorer that differs.
    """
    for before, after in zip(saved, now, strict=False):
        if before != after:
            raise PlanChanged(
                f"score: the output was planned with the scorer {_told(before)}, now it is "
                f"{_told(after)}; change it back, or write to a new output"
            )
    if len(saved) != len(now):
        names = [", ".join(one.scorer for one in specs) or "none" for specs in (saved, now)]
        raise PlanChanged(
            f"score: the output was planned with the scorers {names[0]}, now they are {names[1]}; "
            "change them back, or write to a new output (`batchgen score` adds scores to a "
            "finished one)"
        )


def _told(spec: ScorerSpec) -> str:
    facts = [f"batch_size {spec.batch_size}", *(f"{a} {b!r}" for a, b in spec.options.items())]
    known = [] if spec.settled is None else [f"fingerprint {spec.settled.fingerprint!r}"]
    return f"{spec.title} ({', '.join([*known, *facts])})"


def source_schema(plan: Plan) -> pa.Schema:
    """The columns of the input with their metadata, read from its first file's footer."""
    first = plan.files[0]
    if not first.path:
        return pa.schema([(COUNTED_COLUMN, pa.int64())])
    with open_input(first.path, plan.spec.input.path, first.etag) as handle:
        return pq.read_schema(handle)


def categories_of(plan: Plan) -> set[Any]:
    """The different categories of the objects of the input, and of those that are to be made.

    Raises:
        InputError: more than MOST_LABELS.
    """
    columns = plan.spec.input.columns
    assert columns.objects is not None
    found = values_of(plan, columns.objects, _categories)
    if columns.new_category is not None:
        found |= values_of(plan, columns.new_category)
    for made in plan.spec.drawn.values():
        category = made.options.get("category", -1)
        found |= {category} if category >= 0 else set()
    return found


def _categories(objects: pa.Array) -> pa.Array:
    """The categories in a column of objects: a struct of lists, or a list of structs."""
    fields = object_fields(objects.type) or {}
    name = "category" if "category" in fields else "category_id"
    if pa.types.is_struct(objects.type):
        return pc.list_flatten(pc.struct_field(objects, name))
    return pc.struct_field(pc.list_flatten(objects), name)


def values_of(
    plan: Plan, column: str, part: Callable[[pa.Array], pa.Array] = lambda whole: whole
) -> set[Any]:
    """The different values of a column of the input, among the plan's rows, without null.

    ``part``: takes the values out of the column, such as the categories out of objects.
    Those of a part that lists its samples are those of all rows up to its last one.

    Raises:
        InputError: more than MOST_LABELS, so they are no classes.
    """
    start, stop = plan.place.first_row, plan.place.first_row + plan.rows
    if plan.place.listed:
        start, stop = 0, int(plan.listed.rows.max()) + 1
    row, found = 0, set[Any]()
    for file in plan.files:
        if row + file.rows <= start or row >= stop:
            row += file.rows
            continue
        with open_input(file.path, plan.spec.input.path, file.etag) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            for batch in parquet.iter_batches(65_536, columns=[column], use_threads=False):
                values = part(batch.column(0)[max(0, start - row) : max(0, stop - row)])
                row += len(batch)
                found |= set(python_values(pc.unique(values.cast(plain_type(values.type)))))
                if len(found) > MOST_LABELS:
                    raise too_many_labels(column)
    return found - {None}


def too_many_labels(column: str) -> InputError:
    """The error of a column that has more different values than classes."""
    return InputError(
        f"column {column!r} has more than {MOST_LABELS:,} different values; a scorer that compares "
        "classes needs a column of classes"
    )
