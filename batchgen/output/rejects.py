"""Lists rejected and failed samples of an output by reason; these are not in ``data/``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.output.formats import REJECT_COLUMNS, read_parquet
from batchgen.output.ledger import Ledger, rejects_name
from batchgen.output.marker import Marker
from batchgen.records import Dropped
from batchgen.secrets import redact


@dataclass(frozen=True)
class Group:
    """The samples that were dropped for one reason: their number, and the first of them.

    A shard that failed has one entry for all of its samples, with the shard as its key.
    """

    reason: str
    count: int
    samples: tuple[Dropped, ...]


def by_reason(ledger: Ledger, only: str | None = None, limit: int | None = None) -> list[Group]:
    """The dropped samples of an output, the most frequent reason first.

    Args:
        ledger: the ledger of the output.
        only: one reason; the others are left out.
        limit: the number of samples to read for each reason; None for all.

    Raises:
        InputError: the output has no plan, or its rejects cannot be read.
    """
    states = ledger.states(ledger.parts())
    counts: Counter[str] = Counter()
    found: dict[str, list[Dropped]] = {}

    def is_wanted(reason: str) -> bool:
        return limit is None or len(found.get(reason, ())) < limit

    for failure in ledger.failures(states.failed):
        counts[failure.error] += failure.planned
        if is_wanted(failure.error):
            key = f"shard {failure.shard}"
            message = redact(failure.message)
            one = Dropped(key, "", 0, "failed", failure.error, message)
            found.setdefault(failure.error, []).append(one)
    for marker in ledger.markers(states.committed):
        counts.update(marker.reasons)
        if any(is_wanted(reason) for reason in marker.reasons if only in (None, reason)):
            for one in _rejects(ledger, marker):
                if is_wanted(one.reason):
                    found.setdefault(one.reason, []).append(one)
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return [
        Group(reason, count, tuple(found.get(reason, ())))
        for reason, count in ordered
        if only in (None, reason)
    ]


def dropped_of(ledger: Ledger, shards: Iterable[int]) -> Iterator[Dropped]:
    """The rejected and failed samples of committed shards.

    Raises:
        InputError: rejects cannot be read.
    """
    for marker in ledger.markers(shards):
        if marker.counts.rejected or marker.counts.failed:
            yield from _rejects(ledger, marker)


def _rejects(ledger: Ledger, marker: Marker) -> Iterator[Dropped]:
    name = rejects_name(marker.shard)
    try:
        rows = read_parquet(ledger.store.read(name)).select(REJECT_COLUMNS.names).to_pylist()
    except (FileNotFoundError, pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"{ledger.store.url}/{name} cannot be read ({type(error).__name__}); "
            f"see `batchgen verify {ledger.store.url}`"
        ) from error
    for row in rows:
        yield Dropped(**{**row, "message": redact(row["message"])})
