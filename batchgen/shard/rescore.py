"""Scores the images of a committed shard: reads them from the output and calls the scorers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, RetryShard
from batchgen.images.files import pixels_in
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.find import contents
from batchgen.output.formats import format_of
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.score_set import KEY
from batchgen.plan.plan import Plan
from batchgen.shard.prepare import prepare
from batchgen.shard.work import Trial
from batchgen.stages.scorers.call import called, read_only
from batchgen.stages.scorers.scorer import Array, Scored, Scorer

AT_ONCE = 64  # images that are decoded at a time
COMPARED = ("image", "control")  # the parts of a row that scorers compare the image with


@dataclass(frozen=True)
class Rescored:
    """The scores of a shard.

    Attributes:
        table: the key and the scores of each accepted sample; null if it has none.
        failed: key -> error, of samples that could not be scored.
        timings_s: seconds of reading and of scoring.
    """

    table: pa.Table
    failed: Mapping[str, str]
    timings_s: dict[str, float] = field(default_factory=dict)


def rescore(
    scorers: Sequence[Scorer], output: Ledger, plan: Plan, marker: Marker, trial: Trial
) -> Rescored:
    """Score all images of a shard.

    Args:
        scorers: what computes the scores.
        output: the ledger of the output.
        plan: the plan of the shard's part.
        marker: of the shard.
        trial: how to make this attempt.

    Raises:
        RetryShard: the shard's files, or its rows of the input, cannot be read.
        OutOfMemory: a scorer ran out of memory.
        ModelError: a scorer did not return the columns that it names.
    """
    start = time.perf_counter()
    names = {name for scorer in scorers for name in scorer.reads}
    try:
        rows = _rows(output, plan, marker, {KEY, "image", *names})
        sources = _sources(plan, marker) if any(one.compares for one in scorers) else {}
    except InputError as error:
        raise RetryShard(str(error)) from error
    read = time.perf_counter()
    keys: list[str] = rows.column(KEY).to_pylist()
    found: dict[str, list[Any]] = {
        column.name: [None] * len(keys) for scorer in scorers for column in scorer.columns
    }
    for places in groups(keys, trial):
        trial.working_on(keys[place] for place in places)
        some = rows.take(pa.array(places, pa.int64()))
        scored = Scored(
            [read_only(pixels_in(image["bytes"])) for image in some.column("image").to_pylist()],
            {name: some.column(name).to_pylist() for name in names},
            [read_only(sources.get(keys[place])) for place in places] if sources else (),
        )
        for scorer in scorers:
            for name, values in called(scorer, scored).items():
                if name not in found:  # a figure that only filters read
                    continue
                for place, value in zip(places, values, strict=True):
                    found[name][place] = value
        trial.made(len(places))
    table = _table(keys, scorers, found)
    done = time.perf_counter()
    timings = {"read": round(read - start, 6), "score": round(done - read, 6)}
    return Rescored(
        table, {key: trial.without[key] for key in keys if key in trial.without}, timings
    )


def groups(keys: Sequence[str], trial: Trial) -> Iterator[list[int]]:
    """The places of the samples that are scored together; suspects are scored one by one."""
    usual = [
        place
        for place, key in enumerate(keys)
        if key not in trial.alone and key not in trial.without
    ]
    for start in range(0, len(usual), AT_ONCE):
        yield usual[start : start + AT_ONCE]
    for place, key in enumerate(keys):
        if key in trial.alone and key not in trial.without:
            yield [place]


def _table(keys: list[str], scorers: Sequence[Scorer], found: Mapping[str, list[Any]]) -> pa.Table:
    columns: dict[str, pa.Array] = {KEY: pa.array(keys, pa.string())}
    for scorer in scorers:
        for column in scorer.columns:
            columns[column.name] = pa.array(found[column.name], column.kind)
    return pa.table(columns)


def _rows(output: Ledger, plan: Plan, marker: Marker, names: set[str]) -> pa.Table:
    """The columns that are needed of a shard's accepted samples."""
    return format_of(plan).read(dict(contents(output, marker)), names)


def _sources(plan: Plan, marker: Marker) -> dict[str, Array]:
    """Key -> the conditioning image as the model got it, from the rows of the input."""
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    found: dict[str, Array] = {}
    for span in make_spans(plan, [marker.shard]):
        for rows in read_span(span, plan.spec, columns):
            prepared = prepare(rows, plan)
            part = next((one for one in COMPARED if one in prepared.images), None)
            images = {} if part is None else prepared.images[part]
            found |= {one.key: images[one.row] for one in prepared.samples if one.row in images}
    return found
