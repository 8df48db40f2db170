"""Checks the score sets of an output: their markers, their files, and the keys in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from batchgen.errors import BatchgenError, DamagedRecord
from batchgen.output.find import keys_of
from batchgen.output.formats import UNREADABLE, format_of
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.score_set import (
    KEY,
    ScoreSet,
    SetFiles,
    content_of,
    file_of,
    files_of,
    ledger_of,
    read_set,
    scores_of,
    set_names,
    withdraw,
)
from batchgen.plan.plan import Plan

_THREADS = 4


class Flaw(NamedTuple):
    """What is wrong with a score set; ``shard`` is None if it is wrong with the set as a whole."""

    name: str
    shard: int | None
    text: str


def flaws_of(ledger: Ledger, quick: bool = False) -> list[Flaw]:
    """What is wrong with the score sets of an output; empty if nothing is.

    A shard's scores are sound if their marker is one of the set, their file has the committed
    bytes, and its keys are those of the shard's samples, in their order. Shards that are not scored
    yet, or that changed since, are no flaw.

    Args:
        ledger: of the output.
        quick: check only markers and listings.
    """
    names = set_names(ledger)
    if not names:
        return []
    shards = [
        (plan, marker)
        for plan in ledger.parts()
        for marker in ledger.markers(ledger.states(plan).committed)
    ]
    return [flaw for name in names for flaw in _flaws(ledger, name, shards, quick)]


def withdraw_scores(ledger: Ledger, flaws: Sequence[Flaw]) -> list[str]:
    """Make the shards with flaws pending again; returns a line for each of them."""
    told = []
    for name in sorted({flaw.name for flaw in flaws}):
        files = files_of(ledger, name)
        for shard in sorted(
            {one.shard for one in flaws if one.name == name and one.shard is not None}
        ):
            withdraw(ledger, files, shard)
            told.append(f"withdrawn: shard {shard} of score set {name}")
    return told


def _flaws(
    ledger: Ledger, name: str, shards: Sequence[tuple[Plan, Marker]], quick: bool
) -> Iterator[Flaw]:
    try:
        record = read_set(ledger, name)
    except DamagedRecord as error:
        yield Flaw(name, None, str(error))
        return
    if record is None:
        return
    files = files_of(ledger, name)
    marked = [one for one in shards if one[1].shard in files.marked]

    def one(pair: tuple[Plan, Marker]) -> str:
        return _wrong(ledger, record, files, *pair, quick)

    with ThreadPoolExecutor(_THREADS) as pool:
        for (_, marker), text in zip(marked, pool.map(one, marked), strict=True):
            if text:
                yield Flaw(name, marker.shard, f"score set {name}: shard {marker.shard}: {text}")


def _wrong(
    ledger: Ledger, record: ScoreSet, files: SetFiles, plan: Plan, source: Marker, quick: bool
) -> str:
    """What is wrong with the scores of a shard; empty if nothing is."""
    try:
        marker = ledger_of(ledger, record.name).marker(source.shard)
    except DamagedRecord as error:
        return str(error)
    name = file_of(record.name, source.shard, content_of(source))
    if marker is None or [file.name for file in marker.files] != [name]:
        return ""  # scored before the shard's content changed, or withdrawn meanwhile
    if marker.spec_fingerprint != record.fingerprint:
        return "its marker is of other scorers than the set's"
    if files.files.get(name.rpartition("/")[2]) != marker.files[0].bytes:
        return f"{name} is missing or has another size than when it was committed"
    if quick:
        return ""
    try:
        table = scores_of(ledger, marker)
        columns = [KEY, *(column.name for column in record.columns)]
        if table.column_names != columns:
            return f"its columns are {', '.join(table.column_names)}, not {', '.join(columns)}"
        if table.column(KEY).to_pylist() != keys_of(ledger, format_of(plan), source):
            return "its keys are not those of the shard's samples"
    except BatchgenError as error:
        return str(error)
    except UNREADABLE as error:
        return f"{name} cannot be read: {error}"
    return ""
