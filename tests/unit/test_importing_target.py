"""An import is written in files and row groups of bounded size, all of it or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.importing.listing import Listing, listed
from batchgen.importing.rows import Columns, Dataset, Kind, Later, Options, Place, Row
from batchgen.importing.summary import Summary
from batchgen.importing.target import ROW_GROUP_BYTES, Target, target_at
from batchgen.importing.work import Source, import_source, source_at
from tests.datasets_on_disk import png

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

# A shell starts background processes with SIGINT ignored, and tests may run in one.
HEARS_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from batchgen.cli import main
main()
"""


def source_of(folder: Path, dataset: Dataset) -> Source:
    """A source whose rows are given."""

    def read(listing: Listing, options: Options) -> Dataset:
        return dataset

    folder.mkdir(exist_ok=True)
    (folder / "x.txt").write_text("x")
    return Source(listed(str(folder)), Kind("made", "", lambda _: True, read), "bytes")


def blobs(count: int, size: int) -> Dataset:
    """Rows with an image of ``size`` random bytes."""
    schema = pa.schema([("image", IMAGE)])
    rows = [
        Row(f"k{number}", {"image": {"bytes": os.urandom(size), "path": None}}, Place("x"))
        for number in range(count)
    ]
    return Dataset(Columns(schema, parts={"image": "image"}), iter(rows))


def test_row_groups_and_files_are_bounded(tmp_path: Path) -> None:
    target = target_at(str(tmp_path / "out"), file_bytes=40 << 20)
    summary = import_source(source_of(tmp_path / "in", blobs(64, 2 << 20)), target)
    names = sorted(one.name for one in (tmp_path / "out").iterdir())
    assert names == [f"part-{at:05d}-of-{len(names):05d}.parquet" for at in range(len(names))]
    assert len(names) > 3 and summary.rows == 64
    for name in names:
        path = tmp_path / "out" / name
        assert path.stat().st_size <= 40 << 20
        read = pq.read_metadata(path)
        for number in range(read.num_row_groups):
            assert read.row_group(number).total_byte_size <= ROW_GROUP_BYTES + (3 << 20)
    assert pq.read_table(tmp_path / "out").column("key").to_pylist() == [
        f"k{number}" for number in range(64)
    ]


def test_a_target_that_ends_in_parquet_is_one_file(tmp_path: Path) -> None:
    target = target_at(str(tmp_path / "out.parquet"), file_bytes=1 << 20)
    import_source(source_of(tmp_path / "in", blobs(8, 1 << 20)), target)
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 8


def test_images_are_not_compressed_and_the_rest_is(tmp_path: Path) -> None:
    import_source(source_of(tmp_path / "in", blobs(2, 100)), target_at(str(tmp_path / "o.parquet")))
    group = pq.read_metadata(tmp_path / "o.parquet").row_group(0)
    found = {
        group.column(number).path_in_schema: group.column(number).compression
        for number in range(group.num_columns)
    }
    assert found == {"key": "ZSTD", "image.bytes": "UNCOMPRESSED", "image.path": "ZSTD"}


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("gone")

    dataset = blobs(1, 10)
    dataset.items = iter([*dataset.items, Later("k", Place("x"), fail)])
    with pytest.raises(OSError, match="gone"):
        import_source(source_of(tmp_path / "in", dataset), target_at(str(tmp_path / "out")))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_import_that_is_ended_leaves_nothing_that_looks_complete(
    number: signal.Signals, tmp_path: Path
) -> None:
    """And the next import removes what a killed one left."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a\n" * 3_000_000)
    command = [sys.executable, "-c", HEARS_CTRL_C, "import", "in", "out.parquet"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.parquet.importing-*/part-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait()
    left = [one.name for one in tmp_path.iterdir() if one.name != "in"]
    if number == signal.SIGINT:
        assert (code, left) == (3, [])
    else:
        assert len(left) == 1 and left[0].startswith(".out.parquet.importing-")
    (tmp_path / "in" / "a.txt").write_text("a\n")
    import_source(source_at(str(tmp_path / "in")), target_at(str(tmp_path / "out.parquet")))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "out.parquet"]


def test_what_is_there_is_not_replaced_without_being_asked(tmp_path: Path) -> None:
    def present(name: str) -> Target:
        return target_at(str(tmp_path / name))

    source = source_of(tmp_path / "in", blobs(1, 10))
    import_source(source, present("a.parquet"))
    with pytest.raises(InputError, match=r"a\.parquet exists.*--overwrite"):
        present("a.parquet").refuse_unless_free(overwrite=False)
    present("a.parquet").refuse_unless_free(overwrite=True)
    import_source(source_of(tmp_path / "in", blobs(1, 10)), present("folder"))
    present("folder").refuse_unless_free(overwrite=True)
    (tmp_path / "folder" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine\.txt, which an import did not write"):
        present("folder").refuse_unless_free(overwrite=True)
    (tmp_path / "plain").write_text("x")
    with pytest.raises(InputError, match="plain is a file"):
        present("plain").refuse_unless_free(overwrite=True)


def test_a_new_import_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    first, second = blobs(64, 1 << 20), blobs(1, 10)
    target = target_at(str(tmp_path / "out"), file_bytes=16 << 20)
    import_source(source_of(tmp_path / "in", first), target)
    assert len(list((tmp_path / "out").iterdir())) > 1
    import_source(source_of(tmp_path / "in", second), target)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["part-00000-of-00001.parquet"]


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_store_gets_the_same_files(name: str, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/deep/{name}"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png())
    (tmp_path / "in" / "2.png").write_bytes(b"x")
    summary = import_source(source_at(str(tmp_path / "in")), target_at(url))
    folder = url.rpartition("/")[0]
    memory = fsspec.filesystem("memory")
    found = [one.removeprefix("/") for one in memory.find(folder.removeprefix("memory:/"))]
    base = folder.removeprefix("memory://")
    rows = (
        f"{base}/out.parquet"
        if name.endswith("parquet")
        else f"{base}/out/part-00000-of-00001.parquet"
    )
    assert found == sorted([rows, f"{base}/out-rejects.parquet"])
    assert summary.rejects == f"{folder}/out-rejects.parquet"
    with memory.open(rows) as file:
        assert pq.read_table(file).num_rows == 1


def test_a_bucket_is_no_target() -> None:
    with pytest.raises(InputError, match="a bucket; name a file or a folder in it"):
        target_at("s3://bucket")


def test_a_target_in_its_source_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in", blobs(1, 10))
    with pytest.raises(InputError, match="or inside of it"):
        import_source(source, target_at(str(tmp_path / "in" / "out.parquet")))
    with pytest.raises(InputError, match="or inside of it"):
        import_source(source_at(f"{tmp_path}/in/"), target_at(str(tmp_path / "in" / "o.parquet")))
    (tmp_path / "a.txt").write_text("a\n")  # next to a source that is a file
    import_source(source_at(str(tmp_path / "a.txt")), target_at(str(tmp_path / "a.parquet")))
    with pytest.raises(InputError, match="or inside of it"):
        import_source(source_at(f"{tmp_path}/a.parquet"), target_at(f"{tmp_path}/a.parquet"))


def test_rows_are_counted_and_a_limit_ends_the_import(tmp_path: Path) -> None:
    said: list[int] = []

    def tell(summary: Summary) -> None:
        said.append(summary.rows)

    source = source_of(tmp_path / "in", blobs(50, 10))
    summary = import_source(source, target_at(str(tmp_path / "o.parquet")), 7, tell)
    assert summary.rows == summary.images == said[-1] == 7


def test_a_value_that_does_not_fit_costs_its_row(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int32())])
    rows = [Row(f"k{n}", {"n": n * 2**30}, Place("x", f"line {n}")) for n in range(4)]
    source = source_of(tmp_path / "in", Dataset(Columns(schema), iter(rows)))
    summary = import_source(source, target_at(str(tmp_path / "o.parquet")))
    assert (summary.rows, summary.reasons) == (2, {"bad-value": 2})
    assert "x line 2" in summary.examples["bad-value"]
    assert pq.read_table(tmp_path / "o.parquet").column("n").to_pylist() == [0, 2**30]
