"""The place of a part among the parts of its output, and the samples that some parts list."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import DamagedRecord
from batchgen.storage.documents import Count

NOTHING = -1  # the sample replaces no other one
_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("variant", pa.int32()),
        pa.field("instead_of", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Place:
    """What a later part continues: its plan is numbered on from the parts before it.

    Attributes:
        part: its number; 0 for the plan of the first run.
        first_shard: its first shard; shards are numbered through all parts.
        first_sample: number of the samples of the parts before it.
        first_row: its first row of the input.
        first_variant: the number of each row's first variant.
        before: fingerprint of the plan of the part before it.
        base: the part whose input it reads: 0, or one that added an input.
        why: ``variants``, ``limit``, ``input``, ``again``, ``remake`` or ``quota``.
        round: of a quota, or of remaking, from 1 on; 0 for other parts.
        listed: number of samples that it lists one by one; 0 if it has all variants of its rows.
        samples_sha256: of the file that lists them.
        left: number of further parts of the same extension: one for each further input.
    """

    part: Count = 0
    first_shard: Count = 0
    first_sample: Count = 0
    first_row: Count = 0
    first_variant: Count = 0
    before: str = ""
    base: Count = 0
    why: str = ""
    round: Count = 0
    listed: Count = 0
    samples_sha256: str = ""
    left: Count = 0


FIRST = Place()


def source_name(name: str, place: Place) -> str:
    """The name of an input file; those of added inputs name their part, so that keys differ."""
    return f"part-{place.base}/{name}" if place.base else name


@dataclass(frozen=True, eq=False)
class Listing:
    """The samples of a part, each with its row, its variant, and the variant that it replaces.

    Each array has shape (samples,); the samples are ordered by row and variant.
    """

    rows: np.ndarray[Any, Any]
    variants: np.ndarray[Any, Any]
    instead_of: np.ndarray[Any, Any]

    def to_parquet(self) -> bytes:
        """The file of the listing; equal listings give equal bytes."""
        columns = [self.rows, self.variants, self.instead_of]
        table = pa.table(
            [pa.array(one, field.type) for one, field in zip(columns, _SCHEMA, strict=True)],
            schema=_SCHEMA,
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @cached_property
    def places(self) -> dict[tuple[int, int], int]:
        """(row, variant) -> the number of the sample in the part."""
        pairs = zip(self.rows.tolist(), self.variants.tolist(), strict=True)
        return {pair: number for number, pair in enumerate(pairs)}


def listing_of(samples: list[tuple[int, int, int]]) -> Listing:
    """A listing of (row, variant, replaced variant), in the order of rows and variants."""
    table = np.array(sorted(samples), dtype=np.int64).reshape(-1, 3)
    return Listing(table[:, 0], table[:, 1].astype(np.int32), table[:, 2].astype(np.int32))


def read_listing(data: bytes, place: Place, name: str) -> Listing:
    """The listing of a part, from its file.

    Raises:
        DamagedRecord: it is not the file that the part's plan was made with.
    """
    if hashlib.sha256(data).hexdigest() != place.samples_sha256:
        raise DamagedRecord(
            f"{name} is damaged: it does not have the SHA-256 that its plan names; restore an "
            "undamaged copy"
        )
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    rows, variants, instead_of = (table.column(name).to_numpy() for name in _SCHEMA.names)
    return Listing(rows, variants, instead_of)
