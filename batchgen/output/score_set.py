"""The records of score sets: scores of a finished output, computed after it, shard by shard.

A score set has a frozen record, a ledger of its own, and one small table for each shard: the keys
of its accepted samples and their scores. The output's own files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, PlanChanged, nearest
from batchgen.output.formats import parquet_bytes, read_parquet
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Counts, Marker, Written
from batchgen.stages.scorers.scorer import ScoreColumn, kind_text
from batchgen.storage import subfolders
from batchgen.storage.documents import Time, Version, read_document

SCORES = "_batchgen/scores"
RECORD = "scores.json"
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
SET_VERSION = 1
KEY = "key"
_SHORT = 12  # characters of a shard's fingerprint in the name of its file of scores
_FILE = re.compile(r"(\d{5,})-([0-9a-f]{12})\.parquet")


@dataclass(frozen=True)
class SetColumn:
    """A column of a score set: its name, its type (see ``kind_text``) and its meaning."""

    name: str
    type: str
    about: str


@dataclass(frozen=True, kw_only=True)
class ScoreSet:
    """The frozen record of a score set.

    Attributes:
        name: of the set.
        scorers: what computes the scores, as the user gave it.
        columns: of the set, without the key.
        fingerprint: of the scorers with their models and settings.
        plans: fingerprints of the output's plans when it was last scored, in their order.
        made_at: when it was first scored, in seconds since the epoch.
    """

    name: str
    columns: tuple[SetColumn, ...]
    fingerprint: str
    plans: tuple[str, ...]
    scorers: tuple[dict[str, Any], ...] = ()
    made_at: Time = 0.0
    version: Version = SET_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def told(columns: Iterable[ScoreColumn]) -> tuple[SetColumn, ...]:
    """The columns of scorers as a record tells them."""
    return tuple(SetColumn(one.name, kind_text(one.kind), one.about) for one in columns)


def folder_of(name: str) -> str:
    """The folder of a set's records and data, in the output."""
    return f"{SCORES}/{name}"


def ledger_of(ledger: Ledger, name: str) -> Ledger:
    """The ledger of a score set; its markers and failed markers are like an output's."""
    return Ledger(ledger.store, folder_of(name), "batchgen score")


def lease_folder(name: str) -> str:
    """Where the leases of the runs that score a set are."""
    return f"{folder_of(name)}/lease"


def set_names(ledger: Ledger) -> list[str]:
    """The names of the folders of score sets, whether or not their records can be read."""
    return sorted(name for name in subfolders(ledger.store, SCORES) if SET_NAME.fullmatch(name))


def read_set(ledger: Ledger, name: str) -> ScoreSet | None:
    """The record of a score set; None if there is none.

    Raises:
        DamagedRecord: it is not such a record.
        NewerFormat: a later version wrote it.
    """
    place = f"{ledger.store.url}/{folder_of(name)}"
    try:
        data = ledger.store.read_record(f"{folder_of(name)}/{RECORD}")
    except FileNotFoundError:
        return None
    remedy = f"remove the folder {place} and score again"
    return read_document(ScoreSet, data, f"{place}/{RECORD}", SET_VERSION, remedy)


def require_set(ledger: Ledger, name: str) -> ScoreSet:
    """The record of a score set; InputError names those that there are."""
    found = read_set(ledger, name)
    if found is None:
        known = set_names(ledger)
        raise InputError(
            f"{ledger.store.url} has no score set {name!r}; it has {', '.join(known) or 'none'}"
            f"{nearest(name, known)}"
        )
    return found


def claim_set(ledger: Ledger, record: ScoreSet) -> ScoreSet:
    """Write the record of a new set, or continue the set of that name.

    Returns:
        The record that is valid now; its plans are those of the output.

    Raises:
        PlanChanged: the set has other scorers, or scores of another output.
    """
    if ledger.store.put_new(f"{folder_of(record.name)}/{RECORD}", record.to_json()):
        return record
    found = require_set(ledger, record.name)
    refuse_other(ledger, found, record)
    if found.plans != record.plans:
        found = replace(found, plans=record.plans)
        keep_set(ledger, found)
    return found


def refuse_other(ledger: Ledger, found: ScoreSet, asked: ScoreSet) -> None:
    """Refuse to continue a set with other scorers, or on another output than it was made of.

    Raises:
        PlanChanged: names the set and what differs.
    """
    place = f"score set {found.name!r} of {ledger.store.url}"
    if found.fingerprint != asked.fingerprint:
        before, now = (shown_scorers(one) or "another command" for one in (found, asked))
        raise PlanChanged(
            f"{place} was made by {before}, now asked for: {now}, with another model or other "
            "settings; choose another --name, or the same scorers"
        )
    if found.plans != asked.plans[: len(found.plans)]:
        raise PlanChanged(
            f"{place} has scores of another plan: the output was made again since; choose another "
            f"--name, or remove the folder {folder_of(found.name)}"
        )


def shown_scorers(record: ScoreSet) -> str:
    """The scorers of a set with their models, for messages."""
    return ", ".join(
        f"{one.get('scorer')}{'=' if one.get('model') else ''}{one.get('model') or ''}"
        for one in record.scorers
    )


def keep_set(ledger: Ledger, record: ScoreSet) -> None:
    """Write or replace the record of a score set."""
    ledger.store.put(f"{folder_of(record.name)}/{RECORD}", record.to_json())


def content_of(marker: Marker) -> str:
    """A fingerprint of a shard's files: scores belong to these bytes."""
    files = sorted((file.name, file.sha256) for file in marker.files)
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def file_of(name: str, shard: int, content: str) -> str:
    """The file with the scores of a shard; its name also says which content was scored."""
    return f"{folder_of(name)}/data/{shard:05d}-{content[:_SHORT]}.parquet"


@dataclass(frozen=True)
class SetFiles:
    """The files of a score set, from two listings.

    Attributes:
        name: of the set.
        marked: the shards that have a marker.
        files: name of each file of scores in ``data/`` -> its size in bytes.
    """

    name: str
    marked: frozenset[int]
    files: Mapping[str, int]

    def has(self, marker: Marker) -> bool:
        """Whether the present content of an output's shard is scored."""
        name = file_of(self.name, marker.shard, content_of(marker)).rpartition("/")[2]
        return marker.shard in self.marked and name in self.files

    @cached_property
    def by_shard(self) -> dict[int, list[str]]:
        """Shard -> names of its files in the output; more than one if its content changed."""
        found: dict[int, list[str]] = {}
        for name in sorted(self.files):
            if match := _FILE.fullmatch(name):
                found.setdefault(int(match[1]), []).append(f"{folder_of(self.name)}/data/{name}")
        return found


def files_of(ledger: Ledger, name: str) -> SetFiles:
    """What a score set has, by its listings; no marker is read."""
    stems = (one.removesuffix(".json") for one in ledger.store.list(f"{folder_of(name)}/shards"))
    marked = frozenset(int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return SetFiles(name, marked, ledger.store.list(f"{folder_of(name)}/data"))


def commit_scores(
    ledger: Ledger, record: ScoreSet, source: Marker, table: pa.Table, told: Marker | None = None
) -> Marker:
    """Write the scores of a shard, then their marker. If they are committed, nothing is written.

    Args:
        ledger: of the output.
        record: of the score set.
        source: the output's marker of the shard.
        table: the key and the set's columns, one row for each accepted sample, in their order.
        told: the marker without its files; default: one that says that all were scored.

    Returns:
        The marker that is in storage now.
    """
    count = table.num_rows
    if count != source.counts.accepted:
        raise AssertionError(f"{count} scores for {source.counts.accepted} samples")
    own = ledger_of(ledger, record.name)
    name = file_of(record.name, source.shard, content_of(source))
    committed = own.marker(source.shard)
    if committed is not None and [file.name for file in committed.files] == [name]:
        if committed.spec_fingerprint != record.fingerprint:
            raise PlanChanged(
                f"score set {record.name!r} of {ledger.store.url}: another process stores it with "
                "other scorers; repeat the command when it has ended"
            )
        return committed
    data = parquet_bytes(table)
    ledger.store.put(name, data)
    file = Written(name, len(data), hashlib.sha256(data).hexdigest(), count)
    marker = told or Marker(
        shard=source.shard,
        counts=Counts(count, count, 0, 0),
        files=(),
        spec_fingerprint=record.fingerprint,
        plan_fingerprint=source.plan_fingerprint,
    )
    return own.commit(replace(marker, files=(file,)))


def withdraw(ledger: Ledger, files: SetFiles, shard: int) -> None:
    """Remove the scores of a shard: first the marker, then the files."""
    ledger_of(ledger, files.name).withdraw(shard)
    for name in files.by_shard.get(shard, []):
        ledger.store.delete(name)


def remove_set(ledger: Ledger, name: str) -> None:
    """Remove a score set; its record goes first, so that a broken removal leaves no set.

    Its leases stay: a run that replaces the set may hold one.
    """
    store, folder = ledger.store, folder_of(name)
    store.delete(f"{folder}/{RECORD}")
    for file in sorted(store.find(folder)):
        if not f"{folder}/{file}".startswith(f"{lease_folder(name)}/"):
            store.delete(f"{folder}/{file}")


def scores_of(ledger: Ledger, marker: Marker) -> pa.Table:
    """The table of scores of one shard, as its marker in the set says.

    Raises:
        InputError: its file is missing or was changed.
    """
    (file,) = marker.files
    try:
        data = ledger.store.read(file.name)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        url = ledger.store.url
        raise InputError(f"{url}/{file.name} is missing or damaged; see `batchgen verify {url}`")
    return read_parquet(data)
