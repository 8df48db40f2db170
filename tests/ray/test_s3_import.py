"""Sources in an S3 bucket are imported, and imports are written to one, on a real server."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.importing.direct import How, sourced
from batchgen.importing.target import target_at
from batchgen.importing.work import import_source, source_at
from batchgen.input.uris import uris_of
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import Store, open_store
from jobs import import_sources
from tests.datasets_on_disk import spec_for
from tests.object_store.proxy import FaultProxy, Rule


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    import_sources.main(folder)
    return folder


def put(store: Store, folder: Path) -> None:
    """Copy a local folder into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(folder.parent)), path.read_bytes())


def rows_at(url: str) -> list[dict[str, object]]:
    folder, _, name = url.rpartition("/")
    with open_store(folder).open(name) as file:
        rows: list[dict[str, object]] = pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("name", ["coco", "yolo", "voc", "webdataset", "digits"])
def test_a_bucket_gives_the_rows_of_the_disk(
    name: str, local: Path, s3_bucket: str, tmp_path: Path
) -> None:
    put(open_store(f"{s3_bucket}/in"), local / name)
    import_source(source_at(str(local / name)), target_at(str(tmp_path / "out.parquet")))
    source = source_at(f"{s3_bucket}/in/{name}", images="bytes")
    import_source(source, target_at(f"{s3_bucket}/out.parquet"))
    assert (
        rows_at(f"{s3_bucket}/out.parquet") == pq.read_table(tmp_path / "out.parquet").to_pylist()
    )


def test_references_are_urls_that_the_run_can_fetch(local: Path, s3_bucket: str) -> None:
    put(open_store(f"{s3_bucket}/in"), local / "digits")
    source = source_at(f"{s3_bucket}/in/digits")
    summary = import_source(source, target_at(f"{s3_bucket}/other/out.parquet"))
    assert summary.images_are == "reference" and summary.roots == [f"{s3_bucket}/in/digits"]
    (row, *_) = rows_at(f"{s3_bucket}/other/out.parquet")
    path = str(row["image"]["path"])  # type: ignore[index]
    spec = spec_for(f"{s3_bucket}/other/out.parquet", input__uri_roots=summary.roots)
    found = uris_of(spec).fetch([path])[path]
    assert found == (local / "digits" / str(row["file_name"])).read_bytes()


def test_a_run_keeps_the_import_of_a_local_source_in_the_bucket(
    local: Path, s3_bucket: str
) -> None:
    said: list[str] = []
    how = How(True, False, ExitStack(), said.append, lambda _: None, lambda _: None)
    fields = {"input.path": str(local / "voc"), "output.url": f"{s3_bucket}/out"}
    tree = merge({"task": "image-to-image"}, fields)
    spec = build(sourced(tree, how))
    assert spec.input.path.startswith(f"{s3_bucket}/out/_batchgen/input/")
    assert len(rows_at(f"{spec.input.path}/part-00000-of-00001.parquet")) == 12
    assert sourced(tree, how)["input"]["path"] == spec.input.path
    assert "the import of" in said[-2]


def test_a_large_file_is_uploaded_in_parts_through_faults(
    s3_proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    for number in range(90):
        head = b"P6 512 512 255\n"  # PPM, which has no compression
        (tmp_path / "in").mkdir(exist_ok=True)
        data = head + os.urandom(512 * 512 * 3)
        (tmp_path / "in" / f"{number:02d}.ppm").write_bytes(data)
    source = source_at(str(tmp_path / "in"))
    s3_proxy.rules(Rule("error", method="PUT", target="partNumber", times=2))
    summary = import_source(source, target_at(f"{s3_bucket}/out"))
    assert summary.rows == 90 and summary.bytes > 64 << 20
    assert any("partNumber" in one.target for one in s3_proxy.log)
    rows = rows_at(f"{s3_bucket}/out/part-00000-of-00001.parquet")
    assert rows[7]["image"]["bytes"] == (tmp_path / "in" / "07.ppm").read_bytes()  # type: ignore[index]
