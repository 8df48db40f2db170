"""Refuses inputs in which a key occurs twice, by streaming their key columns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.plan.columns import plain_type, python_values
from batchgen.storage import open_input

if TYPE_CHECKING:
    from batchgen.plan.plan import Plan, SourceFile


def refuse_duplicate_keys(*plans: Plan) -> None:
    """Stream the key columns of the plans' rows and refuse duplicates, also between two plans.

    It needs 16 bytes of memory for each row, whatever the length of the keys. Rows whose key is
    null are not refused here; the run rejects them.

    Raises:
        InputError: names both places.
    """
    counts = [plan.rows for plan in plans]
    digests = b"".join(digest for plan in plans for digest in _key_digests(plan))
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)  # (rows, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1) & halves[order[1:]].any(axis=1)
    if same.any():
        at = int(np.flatnonzero(same)[0])
        places = sorted((int(order[at]), int(order[at + 1])))
        (one, row), (two, other) = (_located(plans, counts, place) for place in places)
        column = plans[-1].spec.input.columns.key
        raise InputError(
            f"input.columns.key: column {column!r} has the same key in {one.path} row {row} and "
            f"{two.path} row {other}; keys must be unique"
        )


def _located(plans: Sequence[Plan], counts: list[int], place: int) -> tuple[SourceFile, int]:
    """The file of a row, and its number there; rows are counted through the plans."""
    for plan, rows in zip(plans, counts, strict=True):
        if place < rows:
            return plan.locate(plan.place.first_row + place)
        place -= rows
    raise AssertionError(place)


def _key_digests(plan: Plan) -> Iterator[bytes]:
    """Yield the 16-byte digests of the keys in row order; zeros for a null.

    Here and wherever Arrow reads from a Python file, its own threads are off: they can abort the
    interpreter at exit (apache/arrow, issues 34314 and 50482; seen once in `verify`).
    """
    name = plan.spec.input.columns.key
    assert name is not None
    skipped, left = plan.place.first_row, plan.rows
    for file in plan.files:
        if left <= 0:
            return
        with open_input(file.path, plan.spec.input.path, file.etag) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            for batch in parquet.iter_batches(65_536, columns=[name], use_threads=False):
                column = batch.column(0)
                found = python_values(column.cast(plain_type(column.type)))
                values = found[skipped : skipped + left]
                skipped, left = max(0, skipped - len(found)), left - len(values)
                yield b"".join(
                    bytes(16)
                    if value is None
                    else hashlib.blake2b(_key_bytes(value), digest_size=16).digest()
                    for value in values
                )


def _key_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
