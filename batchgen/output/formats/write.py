"""Writes a shard's files to storage in any format; the caller writes the marker last."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from batchgen.output.formats.format import DataFile, Format
from batchgen.output.formats.image_folder import ImageFolder
from batchgen.output.formats.parquet import Parquet, parquet_bytes
from batchgen.output.formats.tables import Finished, data_table, rejects_table
from batchgen.output.formats.webdataset import WebDataset
from batchgen.output.ledger import Written, rejects_name
from batchgen.plan.plan import Plan
from batchgen.records import Dropped, ShardRows
from batchgen.storage import Store

FORMATS: dict[str, Format] = {
    "parquet": Parquet(),
    "webdataset": WebDataset(),
    "image-folder": ImageFolder(),
}


def format_of(plan: Plan) -> Format:
    """The format of a plan's data files; a started output keeps the variant it started with."""
    form = FORMATS[plan.spec.output.format]
    if isinstance(form, ImageFolder) and plan.frozen is not None and plan.frozen.unmarked:
        return ImageFolder(portable=False)
    return form


def write_shard(
    store: Store,
    plan: Plan,
    rows: ShardRows,
    finished: Sequence[Finished],
    dropped: Sequence[Dropped],
) -> tuple[Written, ...]:
    """Write the data files, then the rejects if there are any; the caller writes the marker last.

    Samples are in the plan's order, so the same shard always gives the same files, to the byte.
    """
    order = sorted(finished, key=lambda one: (one.sample.row, one.sample.variant))
    files = put_data(store, plan, rows.shard, data_table(plan, rows, order))
    if dropped:
        table = rejects_table(dropped)
        rejects = DataFile(rejects_name(rows.shard), parquet_bytes(table), table.num_rows)
        files.append(put_file(store, rejects))
    return tuple(files)


def put_data(store: Store, plan: Plan, shard: int, table: pa.Table) -> list[Written]:
    """Write the data files of one shard, one after another."""
    files = format_of(plan).files(table, shard, plan.shards)
    return [put_file(store, file) for file in files]


def put_file(store: Store, file: DataFile) -> Written:
    store.put(file.name, file.data)
    digest = hashlib.sha256(file.data).hexdigest()
    return Written(file.name, len(file.data), digest, file.rows)
