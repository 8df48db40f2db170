"""What scorers read beside the pixels: columns of the output, and conditioning images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import SpecError
from batchgen.output.formats import kept_columns, output_schema
from batchgen.plan.columns import python_values
from batchgen.plan.plan import Plan
from batchgen.records import Sample
from batchgen.shard.prepare import Prepared
from batchgen.shard.work import Array, ShardWork
from batchgen.stages.scorers.call import read_only
from batchgen.stages.scorers.scorer import Scored, Scorer

OF_SAMPLES = ("key", "source_id", "variant", "seed", "prompt", "negative_prompt", "class_label")
OF_CALLS = ("num_inference_steps", "guidance_scale", "strength", "width", "height")
COMPARED = ("image", "control")  # the parts of a row that are its conditioning image


def source_images(prepared: Prepared) -> Mapping[int, Array]:
    """Row -> the conditioning image that scorers compare with."""
    part = next((one for one in COMPARED if one in prepared.images), None)
    return {} if part is None else prepared.images[part]


def has_sources(plan: Plan) -> bool:
    """Whether the job's rows have conditioning images to compare with."""
    return any(part in COMPARED for part in plan.spec.image_parts)


def readable_schema(plan: Plan, source: pa.Schema) -> pa.Schema:
    """The columns of the output that scorers may read while images are made, with their metadata.

    Args:
        plan: the plan of the job.
        source: the schema of its input.
    """
    whole = output_schema(plan.spec, source, plan.model.settings)
    kept = kept_columns(plan.spec, source.names, plan.model.settings)
    columns = plan.spec.input.columns
    unset = {"label": columns.label, "class_label": columns.class_label, "prompt": columns.prompt}
    names = {*OF_SAMPLES, *OF_CALLS, "label", "objects", *kept.values()}
    names -= {name for name, column in unset.items() if column is None}
    fields = [field for field in whole if field.name in names]
    if columns.objects is not None:  # the output's type depends on the rows
        kind = source.field(columns.objects).type
        fields = [one.with_type(kind) if one.name == "objects" else one for one in fields]
    return pa.schema(fields, whole.metadata)


class ScoredRows:
    """Gives scorers the images of a micro-batch with what they read."""

    def __init__(self, plan: Plan, work: ShardWork, scorers: Iterable[Scorer]) -> None:
        names = {name for scorer in scorers for name in scorer.reads}
        self._sources = work.sources
        self._read = {name: _reader(name, plan, work) for name in sorted(names)}

    def __call__(self, samples: Sequence[Sample], pixels: Sequence[Array]) -> Scored:
        rows = {name: [read(sample) for sample in samples] for name, read in self._read.items()}
        compared = [read_only(self._sources.get(sample.row)) for sample in samples]
        return Scored([read_only(one) for one in pixels], rows, compared if self._sources else ())


def _reader(name: str, plan: Plan, work: ShardWork) -> Callable[[Sample], Any]:
    """The function that gives a sample's value in a column of the output."""
    if name in OF_SAMPLES:
        return lambda sample: getattr(sample, name)
    if name in OF_CALLS:
        return lambda sample: getattr(sample.call, name)
    if work.labels is not None and name in work.labels.column_names:
        column = work.labels.column(name)
    else:
        column = work.rows.table.column(source_of(name, plan))
    values = python_values(column)
    return lambda sample: values[sample.row]


def source_of(name: str, plan: Plan) -> str:
    """The input's column of a column of the output.

    Raises:
        SpecError: it is not a column of the input, so it has no classes.
    """
    columns = plan.spec.input.columns
    own = {"label": columns.label, "prompt": columns.prompt}.get(name)
    if own is not None:
        return own
    names = [column for column, _ in plan.columns]
    kept = kept_columns(plan.spec, names, plan.model.settings)
    found = next((column for column, output in kept.items() if output == name), None)
    if found is None:
        known = [
            *(one for one in ("label", "class_label") if getattr(columns, one)),
            *kept.values(),
        ]
        allowed = f"a column of classes that the input has: {', '.join(known) or 'none'}"
        raise SpecError("score.options.label", name, allowed)
    return found
