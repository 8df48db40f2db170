"""A quota: how many accepted samples each group has, and which further samples it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen.curate.candidates import as_samples, cell_weights, chosen_rows, needs
from batchgen.curate.columns import Columns, columns_of, quoted
from batchgen.curate.groups import NO_GROUP, Groups, groups_of, source_column
from batchgen.curate.selection import QUOTA, SCHEMA, Query, Selection, keep_selection
from batchgen.errors import InputError, SpecError, nearest
from batchgen.output.extension import first_rows, row_of
from batchgen.output.formats import own_columns
from batchgen.output.ledger import Ledger
from batchgen.output.planned import columns_of as planned_columns
from batchgen.output.quota_record import GroupCount, QuotaRecord, asked_for
from batchgen.plain_text import short
from batchgen.plan.extend import listed_part, next_variant, rows_of
from batchgen.plan.parts import Parts
from batchgen.plan.place import NOTHING
from batchgen.plan.plan import Plan
from batchgen.spec.quota_section import Quota

Array = np.ndarray[Any, Any]
_Z = 1.96  # 95 % of a normal distribution


@dataclass(frozen=True, eq=False)
class Standing:
    """The state of a quota after the committed shards.

    Attributes:
        groups: of the rows.
        counts: one for each group, in the same order.
        rows: of each accepted sample; -1 for those of other inputs. Shape (samples,).
        fits: whether it counts.
        rounds: the round in which it was made.
        columns: of the output, from which the table was read.
        table: key, rank and score of each accepted sample, by key.
        so_far: candidates of each row.
        round: the last round.
    """

    groups: Groups
    counts: tuple[GroupCount, ...]
    rows: Array
    fits: Array
    rounds: Array
    columns: Columns
    table: pa.Table
    so_far: Array
    round: int

    @property
    def lacking(self) -> tuple[GroupCount, ...]:
        return tuple(one for one in self.counts if one.lacking)

    @property
    def candidates(self) -> int:
        return sum(one.candidates for one in self.counts)


def check_quota(quota: Quota, plan: Plan, rows: int) -> None:
    """Check before work starts that a quota can be counted and met.

    ``plan`` is that of the first part, ``rows`` those of the input that all parts have.

    Raises:
        SpecError: a column, a group or a score that does not exist, or a budget that is too small.
        InputError: DuckDB is missing, or a condition cannot be evaluated.
    """
    groups = _groups(quota, plan, rows)
    if (groups.of_row == NO_GROUP).all():
        because = "no row of the input has one of these splits"
        raise SpecError("input.splits", plan.spec.input.splits, "", because=because)
    wanted = _wanted(quota, groups)
    if isinstance(quota.accepted, dict):
        for name in quota.accepted:
            if name not in groups.names:
                shown = ", ".join(groups.names[:8]) + (", ..." if groups.names[8:] else "")
                allowed = f"groups of the rows: {shown}{nearest(name, groups.names)}"
                raise SpecError("quota.accepted", name, allowed)
    most = quota.most(int(wanted.sum()))
    first = int((groups.of_row[: plan.rows] != NO_GROUP).sum()) * plan.spec.variants
    if most < first:
        raise SpecError(
            "quota.budget",
            quota.budget,
            f"at least the {first:,} samples of the first round; lower input.limit or "
            "variants, or raise the budget",
        )
    if quota.follow is not None:
        for name in quota.follow.cells:
            source_column(plan, name, "quota.follow.cells")
    columns = Columns(plan.spec.output.url, _empty(plan))
    columns.query("select key from samples")  # fails without DuckDB
    if quota.by:
        _check_expression(columns, quota.by, "quota.by")
    if quota.follow is not None:
        columns.require([quota.follow.score], "quota.follow.score")
        _check_expression(columns, quoted(quota.follow.score), "quota.follow.score", number=True)
    if quota.where:
        _check_condition(columns, quota.where)
    columns.query(_sql(quota))


def _check_condition(columns: Columns, text: str) -> None:
    """Refuse a condition that is neither true nor false, such as a number."""
    try:
        kind = columns.query(f"select (\n{text}\n) as fits from samples").schema.field(0).type
    except InputError as error:
        raise SpecError("quota.where", text, f"a condition: {error}") from error
    unknown = [one.name for one in columns.output.schema if pa.types.is_null(one.type)]
    if not pa.types.is_boolean(kind) and not any(name in text for name in unknown):
        because = f"it gives {kind}, not true or false; write a comparison, such as `{text} > 0`"
        raise SpecError("quota.where", text, "", because=because)


def _check_expression(columns: Columns, text: str, field: str, number: bool = False) -> None:
    wanted = f"({text})::double" if number else text
    try:
        columns.query(f"select {wanted} from samples")
    except InputError as error:
        raise SpecError(
            field, text, f"a column{' of numbers' if number else ''}: {error}"
        ) from error


def _empty(plan: Plan) -> pa.Table:
    """A table without rows, with the columns that the output will have."""
    fields = {one.name: one.type for one in own_columns(plan.spec, plan.model.settings)}
    kinds = {name: fields.get(name) or _kind(text) for name, text in planned_columns(plan).items()}
    schema = pa.schema([pa.field(name, kind) for name, kind in kinds.items() if name != "image"])
    return schema.empty_table()


def _kind(text: str) -> pa.DataType:
    """A type from its text; null, which fits any condition, for those that are not plain."""
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return pa.null()


def standing_of(ledger: Ledger, parts: Parts, quota: Quota) -> Standing:
    """Count the accepted samples of each group.

    Only the columns of the output are read, not those of score sets that were added later, so that
    a round depends only on the committed shards.
    """
    rows = rows_of(parts, 0)
    own = [plan for plan in parts if not plan.place.base]
    widest = max(own, key=lambda plan: sum(file.rows for file in plan.files))
    groups = _groups(quota, widest, rows)
    columns = replace(columns_of(ledger), joined=(), left_out=())
    table = columns.query(_sql(quota))
    firsts = first_rows(widest)
    numbers = _row_numbers(table.column("source_id").to_pylist(), firsts)
    is_ours = (numbers >= 0) & (groups.of_row[numbers] != NO_GROUP)
    fits = table.column("fits").to_numpy(zero_copy_only=False) & is_ours
    variants = table.column("variant").to_numpy()
    rounds = np.zeros(len(numbers), np.int64)
    so_far = np.zeros(rows, np.int64)
    for plan in own:
        if plan.place.listed:
            np.add.at(so_far, plan.listed.rows, 1)
            code = plan.listed.rows * (1 << 21) + plan.listed.variants
            rounds[np.isin(numbers * (1 << 21) + variants, code)] = plan.place.round
        else:
            first = plan.place.first_row
            so_far[first : first + plan.rows] += plan.spec.variants
    size = len(groups.names)
    accepted = np.bincount(groups.of_row[numbers[fits]], minlength=size)
    grouped = groups.of_row != NO_GROUP
    candidates = np.bincount(groups.of_row[grouped], weights=so_far[grouped], minlength=size)
    wanted = _wanted(quota, groups)
    numbers_of = (one.tolist() for one in (wanted, accepted, candidates.astype(np.int64)))
    counts = tuple(
        GroupCount(name, most, own, of, *_interval(own, of))
        for name, most, own, of in zip(groups.names, *numbers_of, strict=True)
    )
    last = max((plan.place.round for plan in own if plan.place.why == "quota"), default=0)
    return Standing(groups, counts, numbers, fits, rounds, columns, table, so_far, last)


def next_round(parts: Parts, quota: Quota, standing: Standing) -> Plan | None:
    """The part of the next round; None if all groups are full, or rounds or budget are used up."""
    left = left_of(quota, standing)
    if not standing.lacking or standing.round >= quota.rounds or left < 1:
        return None
    told = [(one.lacking, one.accepted, one.candidates) for one in standing.counts]
    deficits, accepted, candidates = np.array(told, np.int64).T
    needed = needs(deficits, accepted, candidates, left)
    cells, weights = _followed(parts, quota, standing)
    rows = chosen_rows(needed, standing.groups, cells, weights, standing.so_far)
    samples = as_samples(rows, next_variant(parts, 0), NOTHING)
    return listed_part(parts, 0, samples, "quota", standing.round + 1) if samples else None


def left_of(quota: Quota, standing: Standing) -> int:
    """The candidates that the budget still allows."""
    return quota.most(sum(one.wanted for one in standing.counts)) - standing.candidates


def _followed(parts: Parts, quota: Quota, standing: Standing) -> tuple[Groups, list[Array | None]]:
    """The cells of the rows, and their weights in each group."""
    follow, count = quota.follow, len(standing.groups.names)
    if follow is None:
        return standing.groups, [None] * count
    plan = max((one for one in parts if not one.place.base), key=lambda one: len(one.files))
    names = [source_column(plan, name, "quota.follow.cells") for name in follow.cells]
    cells = groups_of(plan, len(standing.so_far), names, follow.bins)
    scores = standing.table.column("score").to_numpy(zero_copy_only=False).astype(np.float64)
    known = standing.fits & np.isfinite(scores)
    scores = scores / max(1.0, np.abs(scores[known]).max(initial=0))  # sums of them stay finite
    cell, group = (one.of_row[standing.rows[known]] for one in (cells, standing.groups))
    weights: list[Array | None] = []
    for number in range(count):
        inside = np.unique(cells.of_row[standing.groups.of_row == number])
        own = group == number
        sums, hits = (
            np.bincount(cell[own], weights=values, minlength=len(cells.names))
            for values in (scores[known][own], np.ones(int(own.sum())))
        )
        means = np.where(hits > 0, sums / np.maximum(hits, 1), np.nan)[inside]
        every = np.zeros(len(cells.names))
        every[inside] = cell_weights(means, follow.floor, follow.lowest)
        weights.append(every)
    return cells, weights


def store_quota(ledger: Ledger, parts: Parts, quota: Quota, standing: Standing) -> Selection:
    """Store the selection ``quota``: the wanted number of each group, or all that it has.

    Without ``by``, those of earlier rounds come first, then those with the first keys.
    """
    places = np.full(len(standing.rows), np.iinfo(np.int64).max)
    keys = np.arange(len(standing.rows))  # the table is in the order of the keys
    ranks = standing.table.column("rank").to_numpy(zero_copy_only=False) if quota.by else keys * 0
    order = np.lexsort((keys, standing.rounds, ranks) if quota.by else (keys, standing.rounds))
    numbers = standing.groups.of_row[standing.rows]
    for group in range(len(standing.groups.names)):
        own = order[(standing.fits & (numbers == group))[order]]
        places[own] = np.arange(len(own))
    wanted = np.array([one.wanted for one in standing.counts])[numbers]
    selected = standing.fits & (places < wanted)
    pairs = zip(selected.tolist(), standing.fits.tolist(), strict=True)
    reasons = [None if kept else "rank" if fits else "where" for kept, fits in pairs]
    table = pa.table([standing.table.column("key"), selected, reasons], schema=SCHEMA)
    counts = {one.name: (one.candidates, one.kept) for one in standing.counts}
    query = Query(where=quota.where, by=quota.by, per=quota.per, lowest=quota.lowest)
    return keep_selection(ledger, parts, standing.columns, QUOTA, query, table, counts)


def record_of(quota: Quota, standing: Standing, parts: Parts) -> QuotaRecord:
    """The record of the quota at this standing of the parts."""
    why = ""
    if standing.lacking:
        why = "No row can get further candidates"
        if standing.round >= quota.rounds:
            why = f"All {quota.rounds:,} rounds (quota.rounds) are used up"
        if left_of(quota, standing) < 1:
            why = f"The budget ({short(str(quota.budget))}) is used up"
    return QuotaRecord(
        quota.per,
        quota.where,
        standing.round + 1,
        why,
        standing.counts,
        asked_for(quota),
        len(parts),
    )


def _groups(quota: Quota, plan: Plan, rows: int) -> Groups:
    return groups_of(plan, rows, [source_column(plan, name, "quota.per") for name in quota.per])


def _wanted(quota: Quota, groups: Groups) -> Array:
    """The wanted samples of each group; none for groups that a quota by name leaves out."""
    if isinstance(quota.accepted, int):
        return np.full(len(groups.names), quota.accepted)
    return np.array([quota.accepted.get(name, 0) for name in groups.names])


def _sql(quota: Quota) -> str:
    """One row for each accepted sample, by key: what the rounds depend on."""
    fits = f"coalesce((\n{quota.where}\n)::boolean, false)" if quota.where else "true"
    order = "asc" if quota.lowest else "desc"
    number = f"try_cast((\n{quota.by}\n) as double)"
    known = f"case when isnan({number}) then null else (\n{quota.by}\n) end"
    rank = f"row_number() over (order by {known} {order} nulls last, key)"
    score = f"({quoted(quota.follow.score)})::double" if quota.follow else "null::double"
    return (
        f"select key, source_id, variant, {fits} as fits, "
        f"{rank if quota.by else '0'}::bigint as rank, {score} as score from samples order by key"
    )


def _row_numbers(sources: list[str], firsts: dict[str, int]) -> Array:
    """The row of each sample; -1 for rows of other inputs."""
    known = (one.rpartition("#")[0] in firsts for one in sources)
    pairs = zip(sources, known, strict=True)
    return np.array([row_of(firsts, one) if is_own else -1 for one, is_own in pairs], np.int64)


def _interval(accepted: int, candidates: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    if not candidates:
        return 0.0, 1.0
    rate, square = accepted / candidates, _Z**2
    middle = (rate + square / (2 * candidates)) / (1 + square / candidates)
    spread = rate * (1 - rate) / candidates + square / (4 * candidates**2)
    half = _Z * math.sqrt(spread) / (1 + square / candidates)
    return max(0.0, middle - half), min(1.0, middle + half)
