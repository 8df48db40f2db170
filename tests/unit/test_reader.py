"""The reader yields every pending shard once with exactly its rows, and reads nothing twice."""

from __future__ import annotations

import io
import itertools
import os
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, RetryShard
from batchgen.input.reader import CountingFile, make_spans, read_columns, read_span, span_from_json
from batchgen.plan.keys import row_key
from batchgen.plan.plan import Plan, make_plan
from batchgen.records import ShardRows
from tests.datasets_on_disk import model_for, plan_for, spec_for, write_prompts, write_table


def columns_of(plan: Plan) -> list[str]:
    return read_columns(plan.spec, [name for name, _ in plan.columns])


def read_all(plan: Plan, pending: list[int], max_spans: int = 8) -> list[ShardRows]:
    return [
        rows
        for span in make_spans(plan, pending, max_spans)
        for rows in read_span(span, plan.spec, columns_of(plan))
    ]


@dataclass(frozen=True)
class Case:
    """A dataset's row groups by file, how it is cut, and which shards are pending."""

    files: tuple[tuple[int, ...], ...]
    variants: int
    samples_per_shard: int
    limit: int | None
    max_spans: int
    pending_share: float
    seed: int

    def write(self, folder: Path) -> Plan:
        start = 0
        for index, groups in enumerate(self.files):
            table = pa.table({"prompt": pa.array(_texts(start, sum(groups)), pa.string())})
            write_table(folder / f"{index:02d}.parquet", table, groups)
            start += sum(groups)
        spec = spec_for(
            folder,
            variants=self.variants,
            input__limit=self.limit,
            output__samples_per_shard=self.samples_per_shard,
        )
        return make_plan(spec, model_for(spec))

    def pending(self, plan: Plan) -> list[int]:
        chance = random.Random(self.seed)
        return [shard for shard in range(plan.shards) if chance.random() < self.pending_share]


def _texts(start: int, count: int) -> list[str]:
    return [f"row {row}" for row in range(start, start + count)]


groups = st.lists(st.integers(0, 7), max_size=4).map(tuple)
cases = st.builds(
    Case,
    files=st.lists(groups, min_size=1, max_size=4)
    .map(tuple)
    .filter(lambda files: sum(map(sum, files)) > 0),
    variants=st.integers(1, 4),
    samples_per_shard=st.integers(1, 9),
    limit=st.none() | st.integers(1, 12),
    max_spans=st.integers(1, 6),
    pending_share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 999),
)


def expected_rows(plan: Plan, shard: int) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """From the plan's arithmetic alone: prompts, source ids and row keys."""
    places = [(row, *plan.locate(row)) for row in range(*plan.row_range(shard))]
    return (
        [f"row {row}" for row, _, _ in places],
        tuple(f"{file.name}#{place}" for _, file, place in places),
        tuple(row_key(file.name, place) for _, file, place in places),
    )


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_pending_shard_comes_once_with_its_rows(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = case.write(Path(folder))
        pending = case.pending(plan)
        found = read_all(plan, pending, case.max_spans)
    assert [rows.shard for rows in found] == pending
    for rows in found:
        table = rows.table.column("prompt").to_pylist()
        assert (table, rows.source_ids, rows.row_keys) == expected_rows(plan, rows.shard)
        assert (rows.first_sample, rows.stop_sample) == plan.sample_range(rows.shard)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_spans_are_in_order_few_and_survive_json(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = case.write(Path(folder))
    spans = make_spans(plan, case.pending(plan), case.max_spans)
    assert len(spans) <= case.max_spans
    assert [span_from_json(span.to_json()) for span in spans] == spans
    for span in spans:
        needed = {row for part in span.slices for row in range(part.first_row, part.stop_row)}
        for group in span.groups:
            assert needed & set(range(group.first_row, group.first_row + group.rows))


@settings(max_examples=30, deadline=None)
@given(cases)
def test_groups_are_shared_by_neighbouring_spans_at_most(case: Case) -> None:
    """Only the shard across a border is read by the span before as well."""
    with tempfile.TemporaryDirectory() as folder:
        plan = case.write(Path(folder))
    spans = make_spans(plan, range(plan.shards), case.max_spans)
    for one, two in itertools.pairwise(spans):
        shared = set(one.groups) & set(two.groups)
        assert all(group.first_row < one.slices[-1].stop_row for group in shared)
        assert all(group.first_row + group.rows > two.slices[0].first_row for group in shared)


def noisy_dataset(path: Path, rows: int, groups: list[int]) -> Path:
    """Prompts that hardly compress, so that bytes read can be told from the file's size."""
    chance = random.Random(5)
    texts = [chance.randbytes(200).hex() for _ in range(rows)]
    return write_table(path, pa.table({"prompt": texts}), groups)


def test_a_single_row_group_is_decoded_once(tmp_path: Path) -> None:
    path = noisy_dataset(tmp_path / "a.parquet", 4000, [4000])
    plan = plan_for(path, output__samples_per_shard=100)
    found = read_all(plan, list(range(plan.shards)))
    assert len(found) == 40
    read = sum(rows.read_bytes for rows in found)
    assert 0.9 * path.stat().st_size < read < 1.5 * path.stat().st_size


def test_committed_row_groups_are_not_read(tmp_path: Path) -> None:
    path = noisy_dataset(tmp_path / "a.parquet", 4000, [400] * 10)
    plan = plan_for(path, output__samples_per_shard=100)
    found = read_all(plan, [9, 30], max_spans=256)
    assert [rows.shard for rows in found] == [9, 30]
    assert sum(rows.read_bytes for rows in found) < 0.35 * path.stat().st_size


def test_a_span_stops_reading_after_its_last_shard(tmp_path: Path) -> None:
    path = noisy_dataset(tmp_path / "a.parquet", 40_000, [40_000])
    plan = plan_for(path, output__samples_per_shard=1000)
    (rows,) = read_all(plan, [0])
    assert rows.table.num_rows == 1000
    assert rows.read_bytes < 0.5 * path.stat().st_size


def test_the_rest_of_a_row_group_is_skipped_when_the_next_shard_lies_beyond(
    tmp_path: Path,
) -> None:
    path = noisy_dataset(tmp_path / "a.parquet", 30_000, [20_000, 10_000])
    plan = plan_for(path, output__samples_per_shard=1000)
    found = read_all(plan, [0, 20], max_spans=1)
    assert [rows.shard for rows in found] == [0, 20]
    assert sum(rows.read_bytes for rows in found) < 0.5 * path.stat().st_size


def test_a_span_of_committed_shards_is_no_span(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 10, groups=[5, 5])
    ruined = write_prompts(tmp_path / "b.parquet", 10, groups=[5, 5])
    plan = plan_for(tmp_path, output__samples_per_shard=5)
    ruined.unlink()
    assert make_spans(plan, []) == []
    assert [rows.shard for rows in read_all(plan, [0, 1])] == [0, 1]


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "prompt": ["x", "y"], "blob": [b"z" * 500_000] * 2})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    plan = plan_for(path, input__keep_columns=["a"])
    (rows,) = read_all(plan, [0])
    assert rows.table.column_names == ["a", "prompt"]
    assert rows.read_bytes < 100_000 < path.stat().st_size


def test_columns_keep_the_order_of_the_file(tmp_path: Path) -> None:
    spec = spec_for("in", input__columns__label="kind", input__keep_columns=["a"])
    assert read_columns(spec, ["prompt", "b", "kind", "a"]) == ["prompt", "kind", "a"]
    assert read_columns(spec_for("in"), ["b", "prompt", "a"]) == ["b", "prompt", "a"]


def planned(path: Path, rows: int = 600) -> Plan:
    write_prompts(path, rows, groups=[rows // 2, rows - rows // 2])
    return plan_for(path, output__samples_per_shard=100)


def write_unseen(path: Path, data: bytes) -> None:
    """Write other bytes to a file but keep its modification time."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before))


def fails(plan: Plan) -> str:
    with pytest.raises(InputError) as caught:
        read_all(plan, list(range(plan.shards)))
    return str(caught.value)


def test_a_vanished_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plan = planned(path)
    path.unlink()
    assert fails(plan) == f"input file {path} is missing; restore it, or write to a new output"


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_a_corrupt_page_is_named(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [random.Random(row).randbytes(40).hex() for row in range(600)]
    table = pa.table({"prompt": texts})
    pq.write_table(table, path, compression=codec, use_dictionary=False, row_group_size=300)
    plan = plan_for(path, output__samples_per_shard=100)
    data = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(0)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 2000] = b"\xff" * 2000
    write_unseen(path, bytes(data))
    assert fails(plan).startswith(f"input file {path}, row group 1, cannot be decoded: ")


def test_a_file_that_grew_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plan = planned(path)
    before = path.stat().st_size
    longer = write_prompts(tmp_path / "b.parquet", 900, groups=[450, 450])
    write_unseen(path, longer.read_bytes())
    after = path.stat().st_size
    assert fails(plan) == (
        f"input file {path} has changed: planned with {before} bytes, now it has {after}; "
        "restore it, or write to a new output"
    )


def test_a_file_with_fewer_rows_at_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plan = planned(path)
    write_unseen(path, write_prompts(tmp_path / "b.parquet", 300, groups=[150, 150]).read_bytes())
    size = path.stat().st_size
    files = (replace(plan.files[0], size=size),)
    assert "ended before the last row of shard" in fails(replace(plan, files=files))


def test_a_row_group_that_is_no_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plan = planned(path)
    write_unseen(path, write_prompts(tmp_path / "b.parquet", 300).read_bytes())
    files = (replace(plan.files[0], size=path.stat().st_size),)
    message = fails(replace(plan, files=files))
    assert f"input file {path}" in message or "ended before the last row of shard" in message


class Unreliable(io.BytesIO):
    """A remote file whose connection breaks."""

    def read(self, size: int | None = -1) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_lost_connection_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    plan = planned(path)
    remote = Unreliable(path.read_bytes())
    monkeypatch.setattr("batchgen.input.reader.open_input", lambda *_: remote)
    with pytest.raises(RetryShard, match="Connection reset by peer") as caught:
        read_all(plan, [0])
    assert str(path) in str(caught.value)


def test_the_counting_file_counts_what_is_read_not_what_is_skipped() -> None:
    file = CountingFile(io.BytesIO(b"x" * 100))
    file.seek(40)
    assert (file.read(25), file.tell()) == (b"x" * 25, 65)
    assert (file.take(), file.take()) == (25, 0)
    assert len(file.read()) == file.take() == 35


def test_one_batch_of_a_shard_is_a_single_chunk(tmp_path: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "a.parquet", 3000, groups=[700] * 4 + [200]))
    plan = replace(plan, spec=with_shards(plan, 2000))
    found = read_all(plan, [0, 1])
    chunks: list[Any] = [rows.table.column("number").chunks for rows in found]
    assert [[len(chunk) for chunk in each] for each in chunks] == [[2000], [1000]]


def with_shards(plan: Plan, samples: int) -> Any:
    output = plan.spec.output.model_copy(update={"samples_per_shard": samples})
    return plan.spec.model_copy(update={"output": output})


def test_files_that_differ_in_nullability_meet_in_one_shard(tmp_path: Path) -> None:
    for name, nullable in (("a", True), ("b", False)):
        schema = pa.schema([pa.field("prompt", pa.string(), nullable)])
        pq.write_table(pa.table({"prompt": [name]}, schema=schema), tmp_path / f"{name}.parquet")
    plan = plan_for(tmp_path, tmp_path.parent / "out", output__samples_per_shard=2)
    (span,) = make_spans(plan, [0])
    (rows,) = read_span(span, plan.spec, ["prompt"])
    assert rows.table.column("prompt").to_pylist() == ["a", "b"]


def test_large_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    images = [bytes([n]) * 4_000_000 for n in range(40)]
    table = pa.table({"prompt": ["x"] * 40, "image": images})
    pq.write_table(table, tmp_path / "in.parquet", compression="none", use_dictionary=False)
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", output__samples_per_shard=2)
    (span,) = make_spans(plan, range(plan.shards))
    before = pa.total_allocated_bytes()
    first = next(read_span(span, plan.spec, ["prompt", "image"]))
    assert first.table.column("image").to_pylist() == images[:2]
    assert pa.total_allocated_bytes() - before < 100_000_000
