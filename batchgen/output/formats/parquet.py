"""Parquet: one file per shard, which is a plain table and also a Hugging Face dataset."""

from __future__ import annotations

import io
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.formats.format import PEEKED, DataFile, chosen, loading
from batchgen.output.ledger import data_name
from batchgen.spec.spec import Spec
from batchgen.storage import Store

ROW_GROUP_BYTES = 32 << 20  # small enough for readers that stream
_NAME = re.compile(r"data/train-(\d{5,})-of-\d{5,}\.parquet")


class Parquet:
    """The format ``parquet``; its files contain the unchanged table."""

    def data_files(self) -> str:
        return "data/*.parquet"

    def how_to_load(self, spec: Spec, names: Sequence[str] = ()) -> str:
        return loading("parquet", self.data_files(), 'images[0]["image"], images[0]["prompt"]')

    def file_name(self, shard: int, shards: int) -> str | None:
        return data_name(shard, shards)

    def is_ours(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def shard_of(self, name: str, shards: int) -> int | None:
        found = _NAME.fullmatch(name)
        shard = int(found.group(1)) if found else -1
        return shard if 0 <= shard < shards and name == data_name(shard, shards) else None

    def files(self, table: pa.Table, shard: int, shards: int) -> Iterator[DataFile]:
        yield DataFile(data_name(shard, shards), parquet_bytes(table), table.num_rows)

    def read(self, files: Mapping[str, bytes], columns: Container[str] | None = None) -> pa.Table:
        (data,) = files.values()
        return read_parquet(data, chosen(self.schema(files), columns).names)

    def schema(self, files: Mapping[str, bytes]) -> pa.Schema:
        (data,) = files.values()
        return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).schema_arrow

    def peek(self, store: Store, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        for name in names:
            with store.open(name) as file:
                whole = pq.ParquetFile(file)
                columns = [one for one in PEEKED if one in whole.schema_arrow.names]
                batches = whole.iter_batches(count, columns=columns, use_threads=False)
                for row in [row for batch in islice(batches, 1) for row in batch.to_pylist()]:
                    yield {**row, "image": row["image"]["bytes"]}


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read a complete file, without Arrow threads that hold a Python object (``plan`` says why)."""
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns, use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file in memory, with uncompressed image bytes and row groups small enough to
    stream."""
    leaves = _leaves(table.schema)
    encoded = [name for name in leaves if not name.startswith("image.")]
    per_row = max(1, table.nbytes // max(1, table.num_rows))
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression={name: "ZSTD" if name in encoded else "NONE" for name in leaves},
        use_dictionary=encoded,
        write_statistics=encoded,
    ) as writer:
        if table.num_rows:  # some readers fail on an empty row group, but not on none
            writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // per_row))
    return sink.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    """Dotted names of the Parquet columns in which a schema is stored."""
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()  # `empty_table` does not support tensor columns
    columns = pq.ParquetFile(sink).schema
    return [columns.column(index).path for index in range(len(columns))]
