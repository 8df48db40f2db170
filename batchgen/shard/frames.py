"""One row of the Ray Data stream: a shard between two stages, serialized to bytes.

Source rows are an Arrow IPC stream, facts about them are JSON, and tensors are safetensors
(``tensor_bytes``). Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from batchgen.errors import to_facts
from batchgen.records import Dropped, Sample, ShardRows, call_from_json
from batchgen.shard.work import Array, Notes, ShardWork

ROWS, ENCODED, DENOISED = "rows", "encoded", "denoised"
COMMITTED, FAILED, STOPPED = "committed", "failed", "stopped"
FINAL = (COMMITTED, FAILED, STOPPED)

_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("state", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("facts", pa.large_binary()),
        pa.field("table", pa.large_binary()),
        pa.field("tensors", pa.large_binary()),
        pa.field("labels", pa.large_binary()),
        pa.field("sources", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class Frame:
    """One shard between two stages.

    Attributes:
        state: ``rows``, ``encoded``, ``denoised``, or a final one: ``committed`` (facts is the
            marker), ``failed`` (facts is the failed marker), ``stopped`` (facts is the error).
        attempt: the number of the attempt at the shard, from 1; 0 before the first stage.
        facts: JSON.
        table: Arrow IPC stream of the source rows.
        tensors: safetensors of all micro-batches.
        labels: Arrow IPC stream of the rows' labels; empty without labels.
        sources: Arrow IPC stream of the conditioning images that scorers compare with.
    """

    shard: int
    state: str
    attempt: int
    facts: bytes
    table: bytes = b""
    tensors: bytes = b""
    labels: bytes = b""
    sources: bytes = b""

    def to_block(self) -> pa.Table:
        return pa.table([[getattr(self, name)] for name in _SCHEMA.names], schema=_SCHEMA)


def from_block(block: pa.Table) -> Frame:
    """The frame in a block of one row."""
    (row,) = block.to_pylist()
    return Frame(**row)


def stopped(shard: int, error: BaseException) -> Frame:
    """A frame that makes the driver raise ``error`` and stop the job: no shard could succeed."""
    return Frame(shard, STOPPED, 0, json.dumps(to_facts(error)).encode())


def from_rows(rows: ShardRows) -> Frame:
    return Frame(
        rows.shard, ROWS, 0, json.dumps(_row_facts(rows)).encode(), _table_bytes(rows.table)
    )


def to_rows(frame: Frame) -> ShardRows:
    return _rows(frame, json.loads(frame.facts))


def from_work(work: ShardWork, state: str, attempt: int, tensors: bytes) -> Frame:
    facts = {
        **_row_facts(work.rows),
        "groups": [[asdict(sample) for sample in group] for group in work.groups],
        "dropped": [asdict(dropped) for dropped in work.dropped],
        "notes": work.notes.facts(),
    }
    table = _table_bytes(work.rows.table)
    labels = b"" if work.labels is None else _table_bytes(work.labels)
    told = json.dumps(facts).encode()
    sources = _table_bytes(_images_table(work.sources)) if work.sources else b""
    return Frame(work.rows.shard, state, attempt, told, table, tensors, labels, sources)


def to_work(frame: Frame) -> ShardWork:
    facts = json.loads(frame.facts)
    return ShardWork(
        rows=_rows(frame, facts),
        groups=tuple(
            tuple(Sample(**{**sample, "call": call_from_json(sample["call"])}) for sample in group)
            for group in facts["groups"]
        ),
        dropped=tuple(Dropped(**dropped) for dropped in facts["dropped"]),
        notes=Notes(**facts["notes"]),
        labels=pa.ipc.open_stream(frame.labels).read_all() if frame.labels else None,
        sources=_images(pa.ipc.open_stream(frame.sources).read_all()) if frame.sources else {},
    )


def _images_table(images: Mapping[int, Array]) -> pa.Table:
    """Row -> image (height, width, 3), as a table of plain bytes."""
    return pa.table(
        {
            "row": pa.array(images, pa.int64()),
            "height": pa.array([one.shape[0] for one in images.values()], pa.int32()),
            "width": pa.array([one.shape[1] for one in images.values()], pa.int32()),
            "pixels": pa.array([one.tobytes() for one in images.values()], pa.large_binary()),
        }
    )


def _images(table: pa.Table) -> dict[int, Array]:
    return {
        one["row"]: np.frombuffer(one["pixels"], np.uint8).reshape(one["height"], one["width"], 3)
        for one in table.to_pylist()
    }


def _row_facts(rows: ShardRows) -> dict[str, object]:
    return {
        "first_sample": rows.first_sample,
        "stop_sample": rows.stop_sample,
        "source_ids": rows.source_ids,
        "row_keys": rows.row_keys,
        "read_bytes": rows.read_bytes,
        "variants": rows.variants,
    }


def _rows(frame: Frame, facts: dict[str, object]) -> ShardRows:
    return ShardRows(
        shard=frame.shard,
        first_sample=int(str(facts["first_sample"])),
        stop_sample=int(str(facts["stop_sample"])),
        table=pa.ipc.open_stream(frame.table).read_all(),
        source_ids=tuple(facts["source_ids"]),  # type: ignore[arg-type]
        row_keys=tuple(facts["row_keys"]),  # type: ignore[arg-type]
        read_bytes=int(str(facts["read_bytes"])),
        variants=tuple(facts["variants"]),  # type: ignore[arg-type]
    )


def _table_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())
