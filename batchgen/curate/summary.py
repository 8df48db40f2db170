"""Sums up score sets and selections for the report: distributions by column and label."""

from __future__ import annotations

import math
from dataclasses import replace

import pyarrow as pa

from batchgen.curate.columns import Columns, Joined, columns_of, quoted
from batchgen.curate.score_sets import Scored, score_sets
from batchgen.curate.selection import stored_selections
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import shown_scorers
from batchgen.report.scores import (
    BINS,
    Distribution,
    SelectionSummary,
    SetSummary,
    keep_summary,
    read_summary,
)

MOST_LABELS = 8  # more lines cannot be told apart


def show_selections(ledger: Ledger) -> None:
    """Put the selections into the report; what it says about scores stays."""
    found = tuple(
        SelectionSummary(
            one.selection.name,
            str(one.selection.query),
            one.selection.selected,
            one.selection.samples,
            one.stale,
        )
        for one in stored_selections(ledger)
    )
    keep_summary(ledger, replace(read_summary(ledger), selections=found))


def show_scores(ledger: Ledger) -> None:
    """Put the score sets with their distributions into the report, and the selections."""
    columns = columns_of(ledger)
    joined = {one.scored.name: one for one in columns.joined}
    labels = _labels(columns)
    found = tuple(
        _summary(one, columns, joined.get(one.name), labels) for one in score_sets(ledger)
    )
    keep_summary(ledger, replace(read_summary(ledger), sets=found))
    show_selections(ledger)


def _summary(
    one: Scored, columns: Columns, joined: Joined | None, labels: tuple[str, ...]
) -> SetSummary:
    """A set; an incomplete one has no distributions yet."""
    shown = () if joined is None else tuple(_distributions(columns, joined, labels))
    return SetSummary(one.name, shown_scorers(one.record), one.done, one.shards, shown)


def _distributions(columns: Columns, joined: Joined, labels: tuple[str, ...]) -> list[Distribution]:
    about = {one.name: one.about for one in joined.scored.record.columns}
    found = []
    for field in joined.table.schema:
        if field.name in joined.names and _is_measured(field.type):
            name = joined.names[field.name]
            made = _distribution(columns, name, about.get(field.name, ""), labels)
            found += [made] if made is not None else []
    return found


def _is_measured(kind: pa.DataType) -> bool:
    """Whether values of a type lie on a scale; those of hashes (uint64) do not."""
    if pa.types.is_uint64(kind):
        return False
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _distribution(
    columns: Columns, name: str, about: str, labels: tuple[str, ...]
) -> Distribution | None:
    """The distribution of a column; None if it has no finite value."""
    value = f"{quoted(name)}::double"
    table = f"(select {value} as v{', label' if labels else ''} from samples)"
    finite = f"from {table} where isfinite(v)"
    limits = f"select min(v) as low, max(v) as high, count(*) as n {finite}"
    (span,) = columns.query(limits, [name]).to_pylist()
    if not span["n"]:
        return None
    low, high = float(span["low"]), float(span["high"])
    width = (high - low) or 1.0
    if not math.isfinite(width):
        return None
    label = "label::varchar" if labels else "''"
    bin_ = f"least({BINS - 1}, floor((v - {low!r}) / {width!r} * {BINS}))::int"
    rows = columns.query(
        f"select {label} as label, {bin_} as bin, count(*) as n {finite} group by all", [name]
    ).to_pylist()
    counts = [0] * BINS
    each = {one: [0] * BINS for one in labels}
    for row in rows:
        counts[row["bin"]] += row["n"]
        if row["label"] in each:
            each[row["label"]][row["bin"]] += row["n"]
    (total,) = columns.query("select count(*) as n from samples", [name]).to_pylist()
    by_label = {one: tuple(some) for one, some in each.items()}
    missing = total["n"] - span["n"]
    return Distribution(name, about, low, high, missing, tuple(counts), by_label)


def _labels(columns: Columns) -> tuple[str, ...]:
    """The labels of the output, if they are few."""
    if "label" not in columns.names:
        return ()
    query = f"select distinct label::varchar as label from samples limit {MOST_LABELS + 2}"
    found = columns.query(query, ["label"]).column("label").drop_null().to_pylist()
    return tuple(sorted(found)) if 1 < len(found) <= MOST_LABELS else ()
