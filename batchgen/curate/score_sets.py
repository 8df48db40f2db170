"""The score sets of an output: which there are, how complete, and storing one that was computed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import DamagedRecord, InputError, Interrupted, NewerFormat
from batchgen.output.find import keys_of
from batchgen.output.formats import format_of
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.score_set import (
    KEY,
    ScoreSet,
    claim_set,
    commit_scores,
    content_of,
    file_of,
    files_of,
    keep_set,
    lease_folder,
    ledger_of,
    read_set,
    remove_set,
    scores_of,
    set_names,
    told,
)
from batchgen.plan.plan import Plan
from batchgen.stages.scorers.scorer import ScoreColumn


@dataclass(frozen=True)
class Scored:
    """A score set and how much of the output it covers now.

    Attributes:
        record: of the set.
        files: of the scored shards.
        done: shards whose present content is scored.
        shards: committed shards of the output.
    """

    record: ScoreSet
    files: tuple[str, ...]
    done: int
    shards: int

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def complete(self) -> bool:
        return 0 < self.done == self.shards


def score_sets(ledger: Ledger, markers: Sequence[Marker] | None = None) -> list[Scored]:
    """The score sets of an output, the earliest first. It reads listings and one record a set.

    Args:
        ledger: of the output.
        markers: of all its committed shards, if they were read already.
    """
    names = set_names(ledger)
    if not names:
        return []
    if markers is None:
        markers = [marker for _, marker in shards_of(ledger)]
    found = [_scored(ledger, name, markers) for name in names]
    return sorted((one for one in found if one is not None), key=_age)


def shards_of(ledger: Ledger) -> Iterator[tuple[Plan, Marker]]:
    """All committed shards of all parts: the plan of the part, and the marker."""
    for plan in ledger.parts():
        for marker in ledger.markers(ledger.states(plan).committed):
            yield plan, marker


def store_scores(
    ledger: Ledger,
    name: str,
    table: pa.Table,
    columns: Sequence[ScoreColumn],
    fingerprint: str,
) -> ScoreSet:
    """Store scores that were computed for the whole output at once, as a score set.

    A set of that name is replaced, if it was stored by this function before.

    Args:
        ledger: of the output.
        name: of the set.
        table: the column ``key`` with each accepted sample once, and the columns.
        columns: of the set.
        fingerprint: of what computed the scores, and its settings.

    Raises:
        InputError: the keys are not those of the output, or `batchgen score` made a set of that
            name.
    """
    before = read_set(ledger, name)
    if before is not None and before.scorers:
        raise InputError(
            f"{ledger.store.url} has a score set {name!r} made by `batchgen score`; choose another "
            "name"
        )
    shards = list(shards_of(ledger))
    tables = list(_by_shard(ledger, table, shards, [one.name for one in columns]))
    record = ScoreSet(
        name=name,
        columns=told(columns),
        fingerprint=fingerprint,
        plans=tuple(plan.fingerprint for plan in ledger.parts()),
        made_at=time.time(),
    )
    lost: list[str] = []
    with hold_lease(ledger.store, lost.append, folder=lease_folder(name)):
        remove_set(ledger, name)
        for (_, marker), rows in zip(shards, tables, strict=True):
            if lost:
                raise Interrupted(f"score set {name!r} is not stored: {lost[0]}; try again")
            commit_scores(ledger, record, marker, rows)
        keep_set(ledger, record)
    return record


def copy_scores(source: Ledger, target: Ledger) -> list[str]:
    """Copy the complete score sets of an output to its export; returns their names.

    A copy may have a part of the samples, by a selection. What the target has already is kept, so
    an interrupted copy continues.

    Raises:
        PlanChanged: the target has another set of that name.
    """
    plans = tuple(plan.fingerprint for plan in target.parts())
    copied = []
    for one in score_sets(source):
        if one.complete:
            record, own = replace(one.record, plans=plans), ledger_of(source, one.name)
            claim_set(target, record)
            files = files_of(target, one.name)
            for plan, marker in shards_of(target):
                scored = None if files.has(marker) else own.marker(marker.shard)
                if scored is not None:
                    rows = scores_of(source, scored)
                    wanted = pa.array(keys_of(target, format_of(plan), marker), pa.string())
                    places = pc.index_in(wanted, rows.column(KEY).combine_chunks())
                    commit_scores(target, record, marker, rows.take(places))
            copied.append(one.name)
    return copied


def _by_shard(
    ledger: Ledger, table: pa.Table, shards: Iterable[tuple[Plan, Marker]], columns: list[str]
) -> Iterator[pa.Table]:
    """The rows of each shard, in the order of its samples."""
    keys = table.column(KEY).combine_chunks().cast(pa.string())
    left = len(keys)
    for plan, marker in shards:
        wanted = pa.array(keys_of(ledger, format_of(plan), marker), pa.string())
        places = pc.index_in(wanted, keys)
        if places.null_count:
            missing = wanted.filter(pc.is_null(places))[0].as_py()
            raise InputError(f"the scores have no row of sample {missing}")
        left -= len(wanted)
        yield table.select([KEY, *columns]).take(places)
    if left:
        raise InputError(f"the scores have {left:,} rows more than the output has samples")


def _scored(ledger: Ledger, name: str, markers: Sequence[Marker]) -> Scored | None:
    """The state of a set; None if it has no record that this version can read.

    `batchgen verify` and `batchgen score` say what is wrong with such a record.
    """
    try:
        record = read_set(ledger, name)
    except (DamagedRecord, NewerFormat):
        return None
    if record is None:
        return None
    found = files_of(ledger, name)
    done = [marker for marker in markers if found.has(marker)]
    files = tuple(file_of(name, marker.shard, content_of(marker)) for marker in done)
    return Scored(record, files, len(done), len(markers))


def _age(one: Scored) -> tuple[float, str]:
    return one.record.made_at, one.name
