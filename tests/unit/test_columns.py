"""Unusual input columns are read as plain types or refused while planning, within memory limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import reader
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.plan import columns
from batchgen.plan.columns import largest_row, plain_table
from batchgen.plan.plan import Plan
from batchgen.records import ShardRows
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_columns
from tests.fuzzing import fuzz
from tests.outputs import table_of

LONG = "a text of more than the twelve bytes that a view holds itself"
VIEWS = {
    "text": pa.array(["a", None, LONG], pa.string_view()),
    "bytes": pa.array([b"a", None, LONG.encode()], pa.binary_view()),
    "list": pa.array([["a"], None, [LONG, None]], pa.list_(pa.string_view())),
    "struct": pa.array([{"x": "a"}, None, {"x": LONG}], pa.struct([("x", pa.string_view())])),
    "map": pa.array([[("a", LONG)], None, []], pa.map_(pa.string_view(), pa.string_view())),
}


def rows_of(plan: Plan) -> list[ShardRows]:
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    spans = make_spans(plan, range(plan.shards))
    return [rows for span in spans for rows in read_span(span, plan.spec, columns)]


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "image-folder"])
def test_views_of_text_and_bytes_are_kept_as_text_and_bytes(
    output_format: str, tmp_path: Path
) -> None:
    prompts = pa.array(["a cat", LONG, "a dog"], pa.string_view())
    path = write_columns(tmp_path / "in" / "a.parquet", {"prompt": prompts, **VIEWS})
    assert pa.string_view() in pq.read_schema(path).types
    plan = plan_for(path, tmp_path / "out", output__format=output_format)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    (marker,) = make_output(plan, ledger)
    assert marker.counts.accepted == 3
    if output_format == "parquet":
        table = table_of(tmp_path / "out")
        assert table.column("prompt").to_pylist() == ["a cat", LONG, "a dog"]
        for name, column in VIEWS.items():
            assert table.column(name).to_pylist() == column.to_pylist()


def test_keys_may_be_views(tmp_path: Path) -> None:
    keys = pa.array(["one", LONG, LONG], pa.string_view())
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a"] * 3, "key": keys})
    with pytest.raises(InputError, match=r"row 1 and .* row 2; keys must be unique"):
        plan_for(path, input__columns__key="key")


@pytest.mark.parametrize(
    "given_metadata",
    [
        b"not JSON",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"info": "text"}',
        b'{"info": null}',
        b'{"info": {"features": ["prompt"]}}',
        b'{"info": {"features": {"prompt": 5}}}',
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_read_of_datasets_metadata_is_ignored(
    given_metadata: bytes, tmp_path: Path
) -> None:
    table = pa.table({"prompt": ["a cat"], "kept": [1]})
    metadata = {b"huggingface": given_metadata, b"other": b"x"}
    path = tmp_path / "in.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    plan = plan_for(path, tmp_path / "out")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    found = json.loads(table_of(tmp_path / "out").schema.metadata[b"huggingface"])
    assert found == {"info": {"features": {"image": {"_type": "Image"}}}}


def test_what_can_be_read_of_it_is_kept() -> None:
    said = json.dumps({"info": {"features": {"x": {"_type": "ClassLabel"}, "y": [{}]}}}).encode()
    table = pa.table({"x": [1]}).replace_schema_metadata({b"huggingface": said})
    assert plain_table(table).schema.metadata == {b"huggingface": said}


def test_a_field_that_stands_twice_is_refused_while_planning(tmp_path: Path) -> None:
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    nested = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), struct)
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a cat"], "boxes": nested})
    with pytest.raises(InputError, match=r"'boxes' in .* is a struct with two fields named 'a'"):
        plan_for(path)
    assert plan_for(path, input__keep_columns=()).rows == 1


def bomb(path: Path, size: int, rows: int, **options: Any) -> Path:
    """``rows`` rows that all refer to one text of that size."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * size])
    pq.write_table(
        pa.table({"prompt": texts}), path, compression="zstd", store_schema=False, **options
    )
    return path


def test_a_small_file_of_large_rows_is_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.parquet", 4_000_000, 600)
    assert path.stat().st_size < 2000  # and 2.4 GB once decoded
    plan = plan_for(path, output__samples_per_shard=8)
    (span,) = make_spans(plan, [0, 1])
    files = reader._Files(plan.spec.input.path, ["prompt"])
    table, _ = next(files.batches(span.groups[0]))
    assert table.schema.types == [pa.string()] and table.nbytes <= 64 << 20
    files.close()
    assert [rows.table.nbytes // 1_000_000 for rows in read_span(span, plan.spec, ["prompt"])] == [
        32,
        32,
    ]


@fuzz(quick=30)
@given(
    st.lists(st.text(max_size=300), min_size=1, max_size=40),
    st.sampled_from(["zstd", "none", "snappy"]),
    st.booleans(),
    st.sampled_from(["1.0", "2.6"]),
    st.data(),
)
def test_no_row_is_larger_than_was_foreseen(
    texts: list[str], codec: str, dictionary: bool, version: str, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=60))
    sink = pa.BufferOutputStream()
    table = pa.table({"x": values, "n": range(len(values))})
    options = {"compression": codec, "use_dictionary": dictionary, "version": version}
    pq.write_table(table, sink, **options)
    file: Any = pa.BufferReader(sink.getvalue())
    group = pq.read_metadata(file).row_group(0)
    chunk = group.column(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_SMALL", 0)
        foreseen = largest_row(file, group, ["x"])
    if dictionary:
        assert foreseen >= max(len(one.encode()) for one in values)
        assert foreseen <= chunk.total_uncompressed_size
    else:
        assert foreseen * len(values) >= sum(len(one.encode()) for one in values)
