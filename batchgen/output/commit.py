"""Commits a shard: writes its data files, then its rejects, and the marker last."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import pyarrow as pa

from batchgen.output.formats import DataFile, format_of
from batchgen.output.ledger import Ledger, rejects_name
from batchgen.output.marker import Marker, Written
from batchgen.plan.plan import Plan
from batchgen.storage import Store


def commit_shard(
    ledger: Ledger, plan: Plan, marker: Marker, accepted: pa.Table, rejects: bytes | None
) -> Marker:
    """Write the files of a shard, then its marker. No other code does this.

    If another attempt has committed the shard meanwhile, its files are left as they are.

    Args:
        ledger: the ledger of the shard's output.
        plan: the plan of that output.
        marker: the shard's marker; its files and the seconds of writing are filled in here.
        accepted: one row for each accepted sample, in the plan's order.
        rejects: the Parquet file of the other samples; None if there are none.

    Returns:
        The marker that is in storage now.

    Raises:
        PlanChanged: a marker of another plan is there.
    """
    counts = marker.counts
    if not counts.add_up() or counts.accepted != accepted.num_rows:
        raise AssertionError(f"counts of shard {marker.shard} do not add up: {counts}")
    committed = ledger.committed(plan, marker.shard)
    if committed is not None:
        return committed
    start = time.perf_counter()
    files = [
        _put(ledger.store, file)
        for file in format_of(plan).files(accepted, marker.shard, plan.numbers.stop)
    ]
    if rejects is not None:
        rows = counts.rejected + counts.failed
        files.append(_put(ledger.store, DataFile(rejects_name(marker.shard), rejects, rows)))
    return ledger.commit(
        replace(
            marker,
            files=tuple(files),
            timings_s={**marker.timings_s, "write": round(time.perf_counter() - start, 6)},
        )
    )


def _put(store: Store, file: DataFile) -> Written:
    store.put(file.name, file.data)
    digest = hashlib.sha256(file.data).hexdigest()
    return Written(file.name, len(file.data), digest, file.rows)
