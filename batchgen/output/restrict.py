"""Restricts a copy of an output to selected samples; the others are listed as rejected."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.output.finished import Proven
from batchgen.output.formats import REJECT_COLUMNS, parquet_bytes, read_parquet, rejects_table
from batchgen.output.marker import Example
from batchgen.output.ranges import ranges_of
from batchgen.plain_text import short
from batchgen.records import Dropped

NOT_SELECTED = "not-selected"  # of reasons.REASONS


@dataclass(frozen=True)
class Chosen:
    """The samples that a copy has: the keys of the selection ``name``."""

    name: str
    keys: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the keys."""
        return hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest()

    @cached_property
    def _values(self) -> pa.Array:
        return pa.array(sorted(self.keys), pa.string())

    def split(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows that are selected, and the others."""
        inside = pc.is_in(table.column("key"), value_set=self._values)
        return table.filter(inside), table.filter(pc.invert(inside))


def restricted(found: Proven, chosen: Chosen) -> Proven:
    """A shard with only the selected samples; its marker counts the others as rejected."""
    kept, others = chosen.split(found.table)
    if not others.num_rows:
        return found
    names = ("key", "source_id", "variant")
    rows = zip(*(others.column(name).to_pylist() for name in names), strict=True)
    message = f"not in the selection {chosen.name!r}"
    left = [
        Dropped(key, source_id, variant, "rejected", NOT_SELECTED, message)
        for key, source_id, variant in rows
    ]
    marker, counts = found.marker, found.marker.counts
    first = min(left, key=lambda one: one.key)
    return Proven(
        replace(
            marker,
            counts=replace(
                counts, accepted=kept.num_rows, rejected=counts.rejected + others.num_rows
            ),
            reasons={**marker.reasons, NOT_SELECTED: others.num_rows},
            examples={**marker.examples, NOT_SELECTED: Example(first.key, message)},
            labels=_labels(kept, marker.labels),
            ranges=ranges_of(kept) if marker.ranges else {},
            truncated_prompts=pc.sum(kept.column("prompt_truncated")).as_py() or 0,
        ),
        kept,
        parquet_bytes(rejects_table([*_rejects(found.rejects), *left])),
    )


def _rejects(data: bytes | None) -> Sequence[Dropped]:
    if data is None:
        return ()
    return [Dropped(**row) for row in read_parquet(data, REJECT_COLUMNS.names).to_pylist()]


def _labels(kept: pa.Table, before: dict[str, int]) -> dict[str, int]:
    """The counts of the labels that the marker counted before."""
    found = Counter(short(str(one)) for one in kept.column("label").to_pylist())
    return {name: found[name] for name in before if found[name]}
