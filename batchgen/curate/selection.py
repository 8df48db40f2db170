"""Selections: which samples of an output to use, as a small table of key, verdict and reason.

A selection is a query over the columns of a finished output. It reads no image, and generates
nothing; the output stays as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.curate.columns import columns_of, quoted
from batchgen.errors import InputError, SpecError, nearest
from batchgen.output.ledger import Ledger
from batchgen.plan.parts import Planned

SELECTIONS = "_batchgen/selections"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
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
    """

    name: str
    query: Query
    samples: int
    selected: int
    reasons: dict[str, int]
    groups: dict[str, tuple[int, int]]
    plan_fingerprint: str
    sha256: str


MOST_GROUPS = 1000


def select(ledger: Ledger, plan: Planned, name: str, query: Query) -> Selection:
    """Select samples of an output, and store the selection in it under ``name``.

    An existing selection of that name is replaced.

    Raises:
        SpecError: a wrong name, or a query that does not fit together.
        InputError: the condition cannot be evaluated, or selects nothing.
    """
    _check(name, query)
    table, groups = _evaluated(ledger, query)
    selected = pa.compute.sum(table.column("selected")).as_py() or 0
    if not selected:
        raise InputError(
            f"selection {name!r} keeps none of {table.num_rows:,} samples; nothing was stored"
        )
    counts = table.column("reason").value_counts().to_pylist()
    reasons = {one["values"]: one["counts"] for one in counts if one["values"] is not None}
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    digest = hashlib.sha256(sink.getvalue()).hexdigest()
    made = Selection(
        name, query, table.num_rows, selected, reasons, groups, plan.fingerprint, digest
    )
    ledger.store.put(f"{SELECTIONS}/{name}.parquet", sink.getvalue())
    ledger.store.put(f"{SELECTIONS}/{name}.json", (json.dumps(asdict(made)) + "\n").encode())
    return made


def selected_keys(ledger: Ledger, plan: Planned, name: str) -> frozenset[str]:
    """The keys of a stored selection.

    Raises:
        InputError: there is no such selection, or it is of another plan; the message lists those
            that there are.
    """
    try:
        told = json.loads(ledger.store.read(f"{SELECTIONS}/{name}.json"))
        data = ledger.store.read(f"{SELECTIONS}/{name}.parquet")
    except (FileNotFoundError, ValueError) as error:
        known = names_in(ledger)
        listed = ", ".join(known) or "none"
        raise InputError(
            f"{ledger.store.url} has no selection {name!r}; it has {listed}{nearest(name, known)}"
        ) from error
    if told.get("plan_fingerprint") not in {one.fingerprint for one in plan.plans}:
        raise InputError(f"selection {name!r} was made of another plan; select again")
    if told.get("sha256") != hashlib.sha256(data).hexdigest():  # or a new one was not completed
        raise InputError(f"selection {name!r} is damaged or incomplete; select again")
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    kept = table.filter(table.column("selected"))
    return frozenset(kept.column("key").to_pylist())


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


def _evaluated(ledger: Ledger, query: Query) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
    """Key, verdict and reason of each sample, and the counts of the groups."""
    columns = columns_of(ledger)
    columns.require(query.per, "--per")
    table = columns.query(_sql(query), [query.where, query.by, *query.per])
    groups = _groups(table) if query.per else {}
    return table.select(SCHEMA.names).cast(SCHEMA), groups


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
