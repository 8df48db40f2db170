"""Selections: which samples of an output to use, as a small table of key, verdict and reason.

A selection is a query over the columns of a finished output. It reads no image, and generates
nothing; the output stays as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.curate.columns import Columns, columns_of, contents_of, quoted
from batchgen.curate.score_sets import Scored, score_sets, shards_of
from batchgen.errors import InputError, SpecError, nearest
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.parts import Planned
from batchgen.plan.plan import Plan
from batchgen.storage.documents import read_document

SELECTIONS = "_batchgen/selections"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
QUOTA = "quota"  # the selection that a quota makes
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("selected", pa.bool_()),
        pa.field("reason", pa.string()),
    ]
)
FITS = '"batchgen: fits"'  # no column of an output has this name


@dataclass(frozen=True)
class Query:
    """What to select.

    Attributes:
        where: a condition in DuckDB's SQL over the columns; empty: all samples.
        top: select at most so many samples of each group.
        by: the column, or expression, by which ``top`` ranks; the highest first.
        per: the columns that make a group; empty: all samples are one.
        lowest: rank the lowest first.
    """

    where: str = ""
    top: int | None = None
    by: str = ""
    per: tuple[str, ...] = ()
    lowest: bool = False

    @property
    def mentions(self) -> list[str]:
        """The texts that may name columns."""
        return [self.where, self.by, *self.per]

    def __str__(self) -> str:
        parts = [f"where {self.where}"] if self.where else []
        if self.top is not None:
            end = "lowest" if self.lowest else "highest"
            per = f" of each {', '.join(self.per)}" if self.per else ""
            parts.append(f"the {self.top:,} {end} by {self.by}{per}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Selection:
    """A selection of an output.

    Attributes:
        name: of the selection.
        query: what was asked.
        samples: the accepted samples of the output.
        selected: those that are selected.
        reasons: why others are not -> their number.
        groups: group -> (samples, selected), if the query has groups; at most MOST_GROUPS.
        plan_fingerprint: of the output's plan.
        sha256: of the table's file.
        contents: a fingerprint of the output's shards when it was selected from them.
        shards: their number.
        sets: score set -> fingerprint of its scorers, for the sets that the query read.
    """

    name: str
    query: Query
    samples: int
    selected: int
    reasons: dict[str, int]
    groups: dict[str, tuple[int, int]]
    plan_fingerprint: str
    sha256: str
    contents: str = ""
    shards: int = 0
    sets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A selection that an output has; ``stale`` says why it must be selected again, or is empty."""

    selection: Selection
    stale: str


MOST_GROUPS = 1000
MOST_SHOWN = 20


def select(ledger: Ledger, plan: Planned, name: str, query: Query) -> Selection:
    """Select samples of an output, and store the selection in it under ``name``.

    An existing selection of that name is replaced.

    Raises:
        SpecError: a wrong name, a quota's own name, or a query that does not fit together.
        InputError: the condition cannot be evaluated, or selects nothing.
    """
    _check(name, query)
    if name == QUOTA and ledger.in_force(ledger.parts()).spec.quota is not None:
        because = "the output has a quota, which keeps its own selection there; use another name"
        raise SpecError("--name", name, "", because=because)
    columns = columns_of(ledger)
    columns.require(query.per, "--per")
    found = columns.query(_sql(query), query.mentions)
    groups, table = _groups(found) if query.per else {}, found.select(SCHEMA.names).cast(SCHEMA)
    selected = pa.compute.sum(table.column("selected")).as_py() or 0
    if not selected:
        raise InputError(
            f"selection {name!r} keeps none of {table.num_rows:,} samples; nothing was stored"
            f"{_labels(columns, query)}"
        )
    return keep_selection(ledger, plan, columns, name, query, table, groups)


def keep_selection(
    ledger: Ledger,
    plan: Planned,
    columns: Columns,
    name: str,
    query: Query,
    table: pa.Table,
    groups: dict[str, tuple[int, int]],
) -> Selection:
    """Store a selection that was made from these columns of the output.

    ``table`` has the columns of SCHEMA, ``groups`` are those of Selection.
    """
    selected = pa.compute.sum(table.column("selected")).as_py() or 0
    counts = table.column("reason").value_counts().to_pylist()
    reasons = {one["values"]: one["counts"] for one in counts if one["values"] is not None}
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    made = Selection(
        name=name,
        query=query,
        samples=table.num_rows,
        selected=selected,
        reasons=reasons,
        groups=groups,
        plan_fingerprint=plan.fingerprint,
        sha256=hashlib.sha256(sink.getvalue()).hexdigest(),
        contents=columns.contents,
        shards=columns.shards,
        sets=columns.used(query.mentions),
    )
    ledger.store.put(f"{SELECTIONS}/{name}.parquet", sink.getvalue())
    ledger.store.put(f"{SELECTIONS}/{name}.json", (json.dumps(asdict(made)) + "\n").encode())
    return made


def selected_keys(ledger: Ledger, plan: Planned, name: str) -> frozenset[str]:
    """The keys of a stored selection.

    Raises:
        InputError: there is no such selection, or the output or a score set changed since; the
            message lists those that there are.
    """
    told = read_selection(ledger, name)
    try:
        data = ledger.store.read(f"{SELECTIONS}/{name}.parquet")
    except FileNotFoundError:
        data = b""
    again = f"`batchgen select {ledger.store.url} --name {name} --again` selects again"
    if told.sha256 != hashlib.sha256(data).hexdigest():  # or a new one was not completed
        raise InputError(f"selection {name!r} is damaged or incomplete; {again}")
    if told.plan_fingerprint not in {one.fingerprint for one in plan.plans}:
        raise InputError(f"selection {name!r} was made of another plan; {again}")
    if why := _changed(told, _now(ledger)):
        raise InputError(f"selection {name!r} is stale: {why}; {again}")
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    kept = table.filter(table.column("selected"))
    return frozenset(kept.column("key").to_pylist())


def read_selection(ledger: Ledger, name: str) -> Selection:
    """A stored selection, without its keys.

    Raises:
        InputError: there is no such selection; names those that there are.
        DamagedRecord: it cannot be read.
    """
    place = f"{SELECTIONS}/{name}.json"
    try:
        data = ledger.store.read_record(place)
    except (FileNotFoundError, InputError) as error:
        known = names_in(ledger)
        listed = ", ".join(known) or "none"
        raise InputError(
            f"{ledger.store.url} has no selection {name!r}; it has {listed}{nearest(name, known)}"
        ) from error
    return read_document(Selection, data, f"{ledger.store.url}/{place}", 1, "select again")


def stored_selections(ledger: Ledger) -> list[Stored]:
    """The selections that an output has, by name."""
    names = names_in(ledger)
    if not names:
        return []
    now = _now(ledger)
    return [Stored(one, _stale(one, now)) for one in (read_selection(ledger, n) for n in names)]


def remove_selection(ledger: Ledger, name: str) -> Selection:
    """Remove a stored selection; returns what it was."""
    found = read_selection(ledger, name)
    for ending in ("json", "parquet"):
        ledger.store.delete(f"{SELECTIONS}/{name}.{ending}")
    return found


@dataclass(frozen=True)
class _Now:
    """What an output has now: its parts, the markers of its shards, its score sets."""

    parts: tuple[Plan, ...]
    markers: list[Marker]
    sets: dict[str, Scored]


def _now(ledger: Ledger) -> _Now:
    markers = [marker for _, marker in shards_of(ledger)]
    sets = {one.name: one for one in score_sets(ledger, markers)}
    return _Now(tuple(ledger.parts()), markers, sets)


def _changed(told: Selection, now: _Now) -> str:
    """Why a selection is wrong by now; empty if it is right for the samples that it judged.

    Later parts of the output do not count: none of their samples is selected.
    """
    stop = next((one.numbers.stop for one in now.parts if _is_of(told, one)), 0)
    judged = [marker for marker in now.markers if marker.shard < stop]
    if told.contents and told.contents != contents_of(judged):
        if told.shards != len(judged):
            return f"the output had {told.shards:,} shards, now it has {len(judged):,}"
        return "shards of the output were generated again since"
    for name, fingerprint in told.sets.items():
        found = now.sets.get(name)
        if found is None:
            return f"its score set {name} was removed"
        if found.record.fingerprint != fingerprint:
            return f"its score set {name} was made again with other settings"
    return ""


def _is_of(told: Selection, plan: Plan) -> bool:
    return plan.fingerprint == told.plan_fingerprint


def _stale(told: Selection, now: _Now) -> str:
    """Why a selection should be made again; empty if it need not."""
    if why := _changed(told, now):
        return why
    if told.contents and told.shards < len(now.markers):
        added = len(now.markers) - told.shards
        return f"the output was extended by {added:,} shards since, whose samples it leaves out"
    return ""


def _labels(columns: Columns, query: Query) -> str:
    """The labels of the output, for a condition about them that nothing meets."""
    if "label" not in columns.names or "label" not in query.where:
        return ""
    found = columns.query("select distinct label from samples order by label", ["label"])
    names = [str(one) for one in found.column("label").drop_null().to_pylist()]
    more = ", ..." if names[MOST_SHOWN:] else ""
    return f"; the labels are {', '.join(names[:MOST_SHOWN])}{more}"


def names_in(ledger: Ledger) -> list[str]:
    """The names of the selections that an output has."""
    found = ledger.store.list(SELECTIONS)
    return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def _check(name: str, query: Query) -> None:
    if not NAME.fullmatch(name):
        raise SpecError("--name", name, "letters, digits, _ and -")
    if query.top is not None and (query.top < 1 or not query.by):
        raise SpecError("--top", query.top, "a number of 1 or more, with --by COLUMN")
    if query.top is None and (query.by or query.per or query.lowest):
        given = query.by or ", ".join(query.per) or "lowest"
        raise SpecError("--by", given, "with --top", because="there is no --top; add it")
    if not query.where and query.top is None:
        raise SpecError("--where", None, "a condition, or --top with --by")


def _sql(query: Query) -> str:
    """A query with one row for each sample: key, selected, reason and group."""
    per = ", ".join(quoted(name) for name in query.per)
    shown = " || ', ' || ".join(f"coalesce({quoted(one)}::varchar, 'null')" for one in query.per)
    order = "asc" if query.lowest else "desc"
    fits = f"coalesce((\n{query.where}\n), false)" if query.where else "true"
    ranked = (
        f"row_number() over (partition by {FITS}{f', {per}' if per else ''} order by "
        f"case when isnan(try_cast((\n{query.by}\n) as double)) then null "
        f"else (\n{query.by}\n) end {order} nulls last, key)"
        if query.top is not None
        else "0"
    )
    most = 0 if query.top is None else query.top
    return f"""
        with judged as (select *, {fits} as {FITS} from samples),
        ranked as (
            select key, {FITS}, {ranked} as place, {shown or "null"} as group_name from judged
        )
        select
            key,
            {FITS} and place <= {most} as selected,
            case when not {FITS} then 'where' when place > {most} then 'rank' end as reason,
            group_name
        from ranked order by key"""


def _groups(table: pa.Table) -> dict[str, tuple[int, int]]:
    found = table.group_by("group_name").aggregate([("selected", "count"), ("selected", "sum")])
    rows = sorted(found.to_pylist(), key=lambda row: str(row["group_name"]))
    return {
        str(row["group_name"]): (row["selected_count"], row["selected_sum"])
        for row in rows[:MOST_GROUPS]
    }
