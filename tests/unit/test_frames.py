"""Frames: a shard between two stages survives serialization, in every state."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import StorageFailed, from_facts
from batchgen.records import Call, Dropped, Sample, ShardRows
from batchgen.shard import frames
from batchgen.shard.frames import Frame, from_block
from batchgen.shard.work import Notes, ShardWork
from tests.datasets_on_disk import png, text_column

TABLE = pa.table(
    {
        "prompt": ["a cat", None, "é🐈\x00"],
        "label": pa.array(["x", "y", "x"]).dictionary_encode(),
        "image": [{"bytes": png(), "path": None}, None, {"bytes": b"", "path": "p"}],
        "tags": [["a"], [], None],
        "odd": text_column([b"\xff", b"ok", b""]),
    }
)
ROWS = ShardRows(
    shard=7,
    first_sample=14,
    stop_sample=19,
    table=TABLE,
    source_ids=("a.parquet#7", "a.parquet#8", "a.parquet#9"),
    row_keys=("a-00000007", "a-00000008", "a-00000009"),
    read_bytes=2**40,
)
CALL = Call(5, 3.5, None, 16, 8)


def sample(row: int, prompt: str, call: Call = CALL) -> Sample:
    return Sample(f"k{row}-v0", f"a.parquet#{row}", row, 0, 2**63 - 1 - row, prompt, "", call)


WORK = ShardWork(
    rows=ROWS,
    groups=(
        (
            sample(0, "a cat"),
            sample(2, "é🐈\x00", replace(CALL, strength=0.1, width=24)),
        ),
    ),
    dropped=(Dropped("k1-v0", "a.parquet#8", 0, "rejected", "null-prompt", "it is 'null'"),),
    notes=Notes({"encode": 0.25}, {"encoder": {"text_encoder": 12}}),
)


def through_a_block(frame: Frame) -> Frame:
    """Writes and reads the frame as one row of an Arrow table, as Ray Data does."""
    sink = pa.BufferOutputStream()
    block = frame.to_block()
    with pa.ipc.new_stream(sink, block.schema) as stream:
        stream.write_table(block)
    return from_block(pa.ipc.open_stream(sink.getvalue()).read_all())


@pytest.mark.parametrize(
    "frame",
    [
        frames.from_rows(ROWS),
        frames.from_work(WORK, frames.ENCODED, 1, b"safetensors"),
        frames.from_work(WORK, frames.DENOISED, 3, b"\x00\xff" * 1000),
        Frame(7, frames.COMMITTED, 2, b'{"shard": 7}'),
        Frame(2**40, frames.FAILED, 2, b'{"error": "E"}'),
        frames.stopped(7, StorageFailed("disk full")),
    ],
    ids=lambda frame: frame.state,
)
def test_every_state_survives_a_block(frame: Frame) -> None:
    assert through_a_block(frame) == frame


def test_every_state_has_the_same_schema() -> None:
    blocks = [frames.from_rows(ROWS).to_block(), Frame(1, frames.FAILED, 1, b"").to_block()]
    assert blocks[0].schema == blocks[1].schema
    assert pa.concat_tables(blocks).num_rows == 2


def test_rows_round_trip() -> None:
    frame = frames.from_rows(ROWS)
    assert (frame.shard, frame.state, frame.attempt) == (7, frames.ROWS, 0)
    again = frames.to_rows(through_a_block(frame))
    assert again.table.schema == TABLE.schema
    assert again == replace(ROWS, table=again.table)
    assert again.table.drop_columns(["odd"]).equals(TABLE.drop_columns(["odd"]))
    odd = again.table.column("odd").cast(pa.binary())
    assert odd.to_pylist() == [b"\xff", b"ok", b""]


def test_a_slice_carries_its_own_rows_alone() -> None:
    """A shard's rows are slices of larger batches, whose other bytes must not be sent."""
    large = pa.table({"prompt": ["x" * 1000] * 1000})
    rows = replace(ROWS, table=large.slice(500, 3).combine_chunks())
    frame = frames.from_rows(rows)
    assert len(frame.table) < 10_000
    assert frames.to_rows(frame).table.num_rows == 3


def test_metadata_of_the_source_schema_is_carried() -> None:
    features = {b"huggingface": b'{"info": {}}'}
    rows = replace(ROWS, table=TABLE.replace_schema_metadata(features))
    assert frames.to_rows(frames.from_rows(rows)).table.schema.metadata == features


def test_an_empty_table_round_trips() -> None:
    rows = replace(ROWS, table=TABLE.slice(0, 0))
    again = frames.to_rows(frames.from_rows(rows))
    assert (again.table.num_rows, again.table.schema) == (0, TABLE.schema)


@pytest.mark.parametrize("state", [frames.ENCODED, frames.DENOISED])
def test_work_round_trip(state: str) -> None:
    frame = through_a_block(frames.from_work(WORK, state, 2, b"tensors"))
    again = frames.to_work(frame)
    assert (frame.state, frame.attempt, frame.tensors) == (state, 2, b"tensors")
    assert again.groups == WORK.groups
    assert again.dropped == WORK.dropped
    assert again.notes == WORK.notes
    assert again.rows == replace(ROWS, table=again.rows.table)


def test_a_stop_names_its_error() -> None:
    frame = frames.stopped(3, StorageFailed("the disk is full"))
    assert (frame.shard, frame.state) == (3, "stopped")
    told = from_facts(json.loads(frame.facts))
    assert (type(told), str(told)) == (StorageFailed, "the disk is full")
    assert frame.state in frames.FINAL
    assert frames.ROWS not in frames.FINAL


calls = st.builds(
    Call,
    st.integers(1, 1000),
    st.floats(0, 100),
    st.none() | st.floats(0.001, 1),
    st.integers(1, 512).map(lambda n: 8 * n),
    st.integers(1, 512).map(lambda n: 8 * n),
)
samples: Any = st.builds(
    Sample,
    key=st.text(),
    source_id=st.text(),
    row=st.integers(0, 2**40),
    variant=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
    prompt=st.text(),
    negative_prompt=st.text(),
    call=calls,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(samples, max_size=5).map(tuple))
def test_samples_come_back_to_the_bit(given_samples: tuple[Sample, ...]) -> None:
    work = replace(WORK, groups=(given_samples, given_samples[:1]))
    again = frames.to_work(through_a_block(frames.from_work(work, frames.ENCODED, 1, b"")))
    assert again.groups == (given_samples, given_samples[:1])
