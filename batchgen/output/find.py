"""Finds one accepted sample of an output by its key, with its row and its shard's marker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, nearest
from batchgen.output.formats import UNREADABLE, Format, format_of
from batchgen.output.formats.parquet import Parquet
from batchgen.output.ledger import Ledger, rejects_name
from batchgen.output.marker import Marker
from batchgen.output.rejects import by_reason
from batchgen.plan.keys import row_key
from batchgen.plan.parts import Planned
from batchgen.plan.plan import Plan


@dataclass(frozen=True)
class Found:
    """An accepted sample: the values of its row, and the marker of its shard."""

    row: dict[str, Any]
    marker: Marker


def find_sample(ledger: Ledger, plan: Planned, key: str) -> Found:
    """Find a sample by its key.

    Keys without a key column say their shard. Otherwise the keys of the committed shards are read
    until one has it.

    Raises:
        InputError: the output has no such sample; the message says why, and suggests a key.
    """
    known = list[str]()
    for marker in ledger.markers(_candidates(ledger, plan, key)):
        form = format_of(plan.of(marker.shard))
        keys = keys_of(ledger, form, marker)
        if key in keys:
            return Found(_row(ledger, form, marker, key), marker)
        known += keys[:100]
    for group in by_reason(ledger, None, None):
        for sample in group.samples:
            if sample.key == key:
                raise InputError(f"sample {key} has no image: {group.reason}: {sample.message}")
    raise InputError(f"{ledger.store.url} has no sample {key}{nearest(key, known)}")


def _candidates(ledger: Ledger, plan: Planned, key: str) -> list[int]:
    committed = ledger.states(plan).committed
    named = [one for one in plan.plans if one.spec.input.columns.key is not None]
    found = {shard_of(one, key) for one in plan.plans if one not in named}
    return sorted(
        shard for shard in committed if shard in found or any(shard in one.numbers for one in named)
    )


def shard_of(plan: Plan, key: str) -> int | None:
    """The shard of a sample whose key is made of its file and row; None if no sample has it."""
    stem, _, variant = key.rpartition("-v")
    first = 0
    for file in plan.files:
        start = row_key(file.name, 0).removesuffix("00000000")
        number = stem.removeprefix(start)
        if stem.startswith(start) and number.isdecimal() and variant.isdecimal():
            row, which = int(number), int(variant)
            if row_key(file.name, row) == stem and row < file.rows:
                sample = plan.sample_at(first + row, which)
                size = plan.spec.output.samples_per_shard
                return None if sample is None else plan.numbers.start + sample // size
        first += file.rows
    return None


def keys_of(ledger: Ledger, form: Format, marker: Marker) -> list[str]:
    """The keys of a shard's samples; of a Parquet file only that column is read."""
    if isinstance(form, Parquet):
        names = [file.name for file in marker.files if form.is_ours(file.name)]
        try:
            with ledger.store.open(names[0]) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                table = parquet.read(["key"], use_threads=False)
        except UNREADABLE as error:
            raise _damaged(ledger, names[0]) from error
    else:
        table = form.read(dict(contents(ledger, marker)), ["key"])
    keys: list[str] = table.column("key").to_pylist()
    return keys


def _row(ledger: Ledger, form: Format, marker: Marker, key: str) -> dict[str, Any]:
    table = form.read(dict(contents(ledger, marker)))
    chosen = table.filter(pc.equal(table.column("key"), key))
    row: dict[str, Any] = chosen.to_pylist()[0]
    return row


def contents(ledger: Ledger, marker: Marker) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the files of a shard, except its rejects; each as its marker says.

    Raises:
        InputError: one is missing or was changed.
    """
    for file in marker.files:
        if file.name == rejects_name(marker.shard):
            continue
        try:
            data = ledger.store.read(file.name)
        except FileNotFoundError as error:
            raise _damaged(ledger, file.name) from error
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(ledger, file.name)
        yield file.name, data


def _damaged(ledger: Ledger, name: str) -> InputError:
    url = ledger.store.url
    return InputError(f"{url}/{name} is missing or damaged; see `batchgen verify {url}`")
