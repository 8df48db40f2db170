"""The records of an export in progress, so that it can continue after an interruption.

They are in the target's ``_batchgen``: one of the request, and one of each shard that is written.
The shards' records are removed once the dataset is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchgen.errors import DamagedRecord
from batchgen.output.marker import Marker
from batchgen.storage import Store, delete_all
from batchgen.storage.documents import Count, Version, read_document

REQUEST = "_batchgen/export.json"
SHARDS = "_batchgen/export"
OURS = (REQUEST, f"{SHARDS}/")
_VERSION = 1
_REMEDY = "remove the folder, then export again"


@dataclass(frozen=True)
class Request:
    """What is exported, and whether it is complete.

    Attributes:
        plan: fingerprint of the source's plan.
        settings: the layout and its options.
        classes: those of ``classes.Classes``, as JSON.
        source: digest of all data files of the source, once the dataset is complete.
        totals: the sums over all shards, once the dataset is complete.
    """

    plan: str
    settings: dict[str, Any]
    classes: dict[str, Any]
    source: str = ""
    totals: dict[str, Any] | None = None
    version: Version = _VERSION

    def is_same(self, plan: str, settings: Mapping[str, Any]) -> bool:
        return (self.plan, self.settings) == (plan, dict(settings))


@dataclass(frozen=True)
class ShardRecord:
    """What was written of one shard.

    Attributes:
        source: digest of the shard's data files.
        counts: split -> [images, objects].
        left_out: reason -> number of images that were left out.
        notes: reason -> number of objects that were left out or changed.
        entries: split -> what the last files need of each image.
    """

    shard: Count
    source: str
    counts: dict[str, tuple[Count, Count]]
    left_out: dict[str, Count]
    notes: dict[str, Count]
    entries: dict[str, list[Any]]
    version: Version = _VERSION


def digest_of(markers: Iterable[Marker]) -> str:
    """A digest of the data files that markers name."""
    names = [f"{file.name} {file.sha256}\n" for marker in markers for file in marker.files]
    return hashlib.sha256("".join(names).encode()).hexdigest()


@dataclass(frozen=True)
class Records:
    """The records in one target."""

    target: Store

    def request(self) -> Request | None:
        try:
            data = self.target.read_record(REQUEST)
        except FileNotFoundError:
            return None
        return read_document(Request, data, f"{self.target.url}/{REQUEST}", _VERSION, _REMEDY)

    def keep_request(self, request: Request) -> None:
        self._put(REQUEST, vars(request))

    def shard(self, shard: int) -> ShardRecord | None:
        """The record of a shard; None if there is none that can be read."""
        name = _name(shard)
        try:
            data = self.target.read_record(name)
            return read_document(ShardRecord, data, f"{self.target.url}/{name}", _VERSION, _REMEDY)
        except (FileNotFoundError, DamagedRecord):
            return None

    def keep_shard(self, record: ShardRecord) -> None:
        self._put(_name(record.shard), vars(record))

    def entries(self, shards: Iterable[int], split: str) -> Iterator[Any]:
        """The entries of a split, one shard in memory at a time."""
        for shard in shards:
            record = self.shard(shard)
            if record is None:
                raise DamagedRecord(
                    f"{self.target.url}/{_name(shard)} was removed or damaged during the export; "
                    "repeat the command"
                )
            yield from record.entries.get(split, [])

    def remove_shards(self) -> None:
        delete_all(self.target, [f"{SHARDS}/{name}" for name in self.target.find(SHARDS)])

    def _put(self, name: str, tree: Mapping[str, Any]) -> None:
        text = json.dumps(dict(tree), ensure_ascii=False)
        self.target.put(name, text.encode())


def _name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.json"
