"""Every output format is read by the usual readers, and verification finds damage in each."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from batchgen.images.files import encode_image
from batchgen.output.formats import FORMATS, IMAGE
from batchgen.output.formats.image_folder import label_folder
from batchgen.output.formats.json_rows import line, samples, table_of
from batchgen.output.ledger import DATA, PLAN, Ledger
from batchgen.output.marker import Written
from batchgen.output.verify import verify
from batchgen.plan.keys import is_safe
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns
from tests.every_format import (
    ACCEPTED,
    BLOB,
    SHARDS,
    digests,
    expected_pixels,
    findings,
    made,
    pixels,
    whole,
)

__all__ = ["whole"]  # a fixture


# Readers


def test_every_format_holds_the_same_samples(whole: Path) -> None:
    found = [digests(whole / name) for name in FORMATS]
    assert len(found[0]) == ACCEPTED
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_plan_gives_the_same_bytes(name: str, whole: Path, tmp_path: Path) -> None:
    made(whole / "a.parquet", tmp_path / "b", name, variants=2, input__columns__label="kind")
    before = {path.name: path.read_bytes() for path in files_of(whole / name)}
    assert {path.name: path.read_bytes() for path in files_of(tmp_path / "b")} == before


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in (out / DATA).rglob("*") if path.is_file())


def as_the_card_says(out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of the card's code, run in the folder of the card."""
    monkeypatch.chdir(out)
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {"cache": str(cache)}
    exec(code.replace("split=", "cache_dir=cache, split="), scope)
    return scope["images"]


@pytest.mark.parametrize("name", FORMATS)
def test_hugging_face_loads_what_the_card_says(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_the_card_says(whole / name, tmp_path, monkeypatch)
    column, text = ("png", "txt") if name == "webdataset" else ("image", "prompt")
    assert len(images) == ACCEPTED
    assert images[0][text].startswith("picture number")
    assert {pixels(row[column]) for row in images} == set(expected_pixels(whole).values())


SPLITS = ("train", "test", "val", "dev", "eval", "validation", "Testing", "x_train", "a-test-b")


@pytest.mark.parametrize("name", FORMATS)
def test_labels_and_keys_that_look_like_splits_lose_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only 4 of 12 images were loaded: `datasets` took the label folders for splits.

    The dataset was moved after it was written.
    """
    words = [*SPLITS, "cat", "dog"]
    columns = {"prompt": prompts(len(words)), "kind": words, "name": words[1:] + words[:1]}
    path = write_columns(tmp_path / "a.parquet", columns)
    mapped = {"input__columns__label": "kind", "input__columns__key": "name"}
    made(path, tmp_path / "out", name, **mapped)
    moved = (tmp_path / "out").rename(tmp_path / "test-train")
    images = as_the_card_says(moved, tmp_path / "cache", monkeypatch)
    rows = [row["json"] if name == "webdataset" else row for row in images]
    assert {(row["key"], row["label"]) for row in rows} == {
        (f"{key}-v0", label) for key, label in zip(columns["name"], words, strict=True)
    }
    monkeypatch.chdir(tmp_path)
    whole = datasets.load_dataset("test-train", split="train", cache_dir=str(tmp_path / "hub"))
    assert len(whole) == len(words)  # by the card's ``configs``, as on the hub


@pytest.mark.parametrize("name", FORMATS)
def test_hugging_face_loads_the_whole_output(name: str, whole: Path, tmp_path: Path) -> None:
    """By the card's ``configs``, as on the hub."""
    found = datasets.load_dataset(str(whole / name), split="train", cache_dir=str(tmp_path))
    assert len(found) == ACCEPTED


def test_image_folder_metadata_reaches_hugging_face(whole: Path, tmp_path: Path) -> None:
    folder = str(whole / "image-folder" / DATA)
    found = datasets.load_dataset(
        "imagefolder", data_dir=folder, split="train", cache_dir=str(tmp_path)
    )
    expected = expected_pixels(whole)
    for row in found:
        assert pixels(row["image"]) == expected[row["key"]]
        assert row["label"] == row["kind"] == int(row["source_id"].partition("#")[2]) % 3
        assert (row["blob"], row["mask_file_name_"]) == ("AP8=", "none.png")


def test_webdataset_library_decodes(whole: Path) -> None:
    url = str(whole / "webdataset" / DATA / "{00000..00003}.tar")
    loader = webdataset.WebDataset(url, shardshuffle=False).decode("pil")
    expected, seen = expected_pixels(whole), []
    for sample in loader:
        seen.append(sample["__key__"])
        assert pixels(sample["png"]) == expected[sample["__key__"]]
        assert sample["txt"] == sample["json"]["prompt"]
        assert sample["cls"] == sample["json"]["label"]
        assert (sample["json"]["blob"], sample["json"]["when"][:10]) == ("AP8=", "2024-01-02")
    assert seen == sorted(expected)


def test_duckdb_and_pandas_read_parquet(whole: Path) -> None:
    files = whole / "parquet" / DATA
    rows = duckdb.sql(f"select key, image.bytes, sha256 from '{files}/*.parquet'").fetchall()
    assert {key: digest for key, _, digest in rows} == digests(whole / "parquet")
    assert all(hashlib.sha256(image).hexdigest() == digest for _, image, digest in rows)
    frame = pd.read_parquet(files)
    assert len(frame) == ACCEPTED
    assert set(frame["label"]) == {0, 1, 2}


class TorchvisionRules:
    """How ``torchvision.datasets.ImageFolder`` finds its samples.

    torchvision itself has no build beside this CPU torch. The rules are those of its documentation
    and of ``torchvision/datasets/folder.py``: classes are the sorted names of the first folders,
    each is walked deeply in sorted order, and a file counts by its extension.
    """

    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

    def __init__(self, root: Path) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples = [
            (os.path.join(folder, name), index)
            for index, label in enumerate(self.classes)
            for folder, _, names in sorted(os.walk(root / label, followlinks=True))
            for name in sorted(names)
            if name.lower().endswith(self.extensions)
        ]


def test_torchvision_style_folders(whole: Path) -> None:
    found = TorchvisionRules(whole / "image-folder" / DATA)
    assert found.classes == ["0", "1", "2"]
    assert len(found.samples) == ACCEPTED
    for path, index in found.samples:
        row = int(Path(path).stem.split("-")[1])
        assert found.classes[index] == str(row % 3)
        with Image.open(path) as image:
            assert image.size == (16, 8)


# The files


def test_a_tar_names_no_time_and_no_owner(whole: Path) -> None:
    with tarfile.open(whole / "webdataset" / DATA / "00000.tar") as archive:
        members = archive.getmembers()
    assert {(one.mtime, one.uid, one.gid, one.uname, one.mode) for one in members} == {
        (0, 0, 0, "", 0o644)
    }
    names = [one.name for one in members]
    assert names[:4] == [f"a-00000000-v0.{end}" for end in ("png", "json", "txt", "cls")]


def test_long_keys_stand_in_a_tar(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["p"], "name": ["k" * 100 + "é"]})
    _, ledger = made(path, tmp_path / "out", "webdataset", input__columns__key="name")
    assert verify(ledger).problems == []
    (sample,) = webdataset.WebDataset(str(tmp_path / "out/data/00000.tar"), shardshuffle=False)
    assert sample["__key__"].startswith("k" * 100) and "json" in sample


def test_text_labels_name_folders_and_stand_in_the_json(tmp_path: Path) -> None:
    """WebDataset readers fail on a ``cls`` that is not a number."""
    labels = ["red fox", None, "../up", "b"]
    path = write_columns(tmp_path / "a.parquet", {"prompt": prompts(4), "kind": labels})
    made(path, tmp_path / "folder", "image-folder", input__columns__label="kind")
    folders = sorted(one.name for one in (tmp_path / "folder/data").iterdir())
    assert [name.partition("-x")[0] for name in folders] == ["b", "images", "red-fox", "up"]
    made(path, tmp_path / "tar", "webdataset", input__columns__label="kind")
    loader = webdataset.WebDataset(str(tmp_path / "tar/data/00000.tar"), shardshuffle=False)
    rows = list(loader.decode())
    assert [row["json"]["label"] for row in rows] == labels
    assert not any("cls" in row for row in rows)
    assert findings(tmp_path / "folder").ok and findings(tmp_path / "tar").ok


def test_label_folders_stay_apart_where_case_is_one() -> None:
    """On Windows and macOS ``A`` and ``a`` shared one folder, and ``aux`` could not be created."""
    labels = ["a", "A", "aB", "Ab", "ab", "ab-u1", "Ab-u1", "con", "CON", "Aux", "aux", "com1"]
    labels += ["a.", "A.", "images", None, "lpt9", "x", "b-U2", "con-x" + "0" * 20]
    folders = [label_folder(label) for label in labels]
    assert len({name.lower() for name in folders}) == len(labels)
    assert not {name.lower() for name in folders} & {"con", "aux", "com1", "lpt9", "nul", "prn"}
    assert folders[:3] == ["a", "A-u1", "aB-u2"]
    assert all(is_safe(name) for name in folders)
    assert label_folder("A", portable=False) == "A"


def test_an_image_folder_of_the_first_version_is_gone_on_with_as_it_was_begun(
    tmp_path: Path,
) -> None:
    """Otherwise a label would have two folders, which readers take for two classes."""
    path = write_columns(tmp_path / "a.parquet", {"prompt": prompts(4), "kind": ["Cat", "dog"] * 2})
    settings = {"output__samples_per_shard": 2, "output__format": "image-folder"}
    plan = plan_for(path, tmp_path / "out", input__columns__label="kind", **settings)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    tree = json.loads(plan.to_json())
    del tree["plan_fingerprint"]
    ledger.store.put(PLAN, json.dumps(tree).encode())
    make_output(ledger.require_plan(), ledger)
    assert sorted(one.name for one in (tmp_path / "out/data").iterdir()) == ["Cat", "dog"]
    assert verify(ledger).problems == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_of_no_accepted_samples(name: str, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["", "", "cat", "dog"]})
    _, ledger = made(path, tmp_path / "out", name, output__samples_per_shard=2)
    assert verify(ledger).problems == verify(ledger, quick=True).problems == []
    written = [file.name for file in files_with_data(ledger, 0)]
    assert (
        written
        == {
            "parquet": ["data/train-00000-of-00002.parquet"],
            "webdataset": ["data/00000.tar"],
            "image-folder": [],
        }[name]
    )
    if name == "webdataset":
        url = str(tmp_path / "out/data/{00000..00001}.tar")
        rows = list(webdataset.WebDataset(url, shardshuffle=False).decode())
        assert [row["txt"] for row in rows] == ["cat", "dog"]


def files_with_data(ledger: Ledger, shard: int) -> list[Written]:
    marker = ledger.marker(shard)
    assert marker is not None
    return [file for file in marker.files if file.name.startswith(DATA)]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_the_files_add_up(name: str, whole: Path) -> None:
    ledger = Ledger(open_store(str(whole / name)))
    rows = [sum(file.rows for file in files_with_data(ledger, n)) for n in range(SHARDS)]
    assert sum(rows) == ACCEPTED


@pytest.mark.parametrize(
    ("name", "end", "kind"),
    [
        ("webdataset", "jpg", "JPEG"),
        ("image-folder", "jpg", "JPEG"),
        ("webdataset", "webp", "WEBP"),
    ],
)
def test_image_formats_in_each(name: str, end: str, kind: str, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["cat"]})
    _, ledger = made(path, tmp_path / "out", name, output__image_format=kind.lower())
    assert verify(ledger).problems == []
    if name == "webdataset":
        found = webdataset.WebDataset(str(tmp_path / "out/data/00000.tar"), shardshuffle=False)
        image = next(iter(found))[end]
    else:
        image = next((tmp_path / "out/data").rglob(f"*.{end}")).read_bytes()
    assert Image.open(io.BytesIO(image)).format == kind


def test_jpeg_subsampling() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(encode_image(noise, "jpeg", 90, one)) for one in ("4:4:4", "4:2:2", "4:2:0")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert encode_image(noise, "jpeg", 90) == encode_image(noise, "jpeg", 90, "4:4:4")


def test_every_type_of_column_survives_json() -> None:
    zone = pa.timestamp("us", "Europe/Berlin")
    columns: dict[str, pa.Array] = {
        "key": pa.array(["p", "p"]),
        "image": pa.array([{"bytes": b"x", "path": "p.png"}] * 2, IMAGE),
        "timestamp": pa.array([1234567890123456789, None], pa.timestamp("ns")),
        "zoned": pa.array([datetime.datetime(2024, 7, 2, 3), None], zone),
        "date": pa.array([datetime.date(2024, 1, 1), None]),
        "time": pa.array([datetime.time(1, 2, 3), None]),
        "duration": pa.array([datetime.timedelta(1), None]),
        "decimal": pa.array([decimal.Decimal("1.25"), None]),
        "bytes": pa.array([BLOB, None]),
        "two_bytes": pa.array([b"ab", None], pa.binary(2)),
        "words": pa.array(["x", None]).dictionary_encode(),
        "texts": pa.array([["a", None], None]),
        "boxes": pa.array([[{"phrase": "p", "box": [1.0, 2.0], "raw": b"q"}], []]),
        "fixed": pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
        "map": pa.array([[("k", b"v")], None], pa.map_(pa.string(), pa.binary())),
        "float32": pa.array([0.1, None], pa.float32()),
        "large": pa.array([2**64 - 1, None], pa.uint64()),
        "null": pa.nulls(2),
    }
    table = pa.table(columns)
    found = list(samples(table))
    rows = [json.loads(line(one.row)) for one in found]
    images = [{"bytes": one.image, "path": one.path} for one in found]
    back = table_of(rows, images, table.schema)
    for name in table.column_names:
        assert back.column(name).to_pylist() == table.column(name).to_pylist(), name
    assert back.schema == table.schema


def test_what_json_cannot_say_becomes_null_or_is_replaced() -> None:
    table = pa.table(
        {
            "key": ["p", "p"],
            "image": pa.array([{"bytes": b"x", "path": "p.png"}] * 2, IMAGE),
            "text": pa.array([b"\xff", b"ok"], pa.binary()).view(pa.string()),
            "number": [float("nan"), float("inf")],
        }
    )
    rows = [one.row for one in samples(table)]
    said = [{"text": "\ufffd", "number": None}, {"text": "ok", "number": None}]
    assert rows == [{"key": "p", **one} for one in said]


# Damage


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(whole / name, tmp_path / "out"))


def image_of(out: Path, shard: int) -> Path:
    return sorted(out.glob(f"data/*/{shard:05d}/*.png"))[0]


def metadata_of(out: Path, shard: int) -> Path:
    return sorted(out.glob(f"data/*/{shard:05d}/metadata.jsonl"))[0]


def tar_of(out: Path, shard: int) -> Path:
    return out / f"data/{shard:05d}.tar"


def replace_file(out: Path, shard: int, path: Path, data: bytes) -> None:
    """Change a file and make its marker agree."""
    path.write_bytes(data)
    marker = out / f"_batchgen/shards/{shard:05d}.json"
    tree = json.loads(marker.read_bytes())
    (entry,) = [file for file in tree["files"] if out / file["name"] == path]
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    marker.write_text(json.dumps(tree))


def name_no_data(out: Path, shard: int) -> None:
    marker = out / f"_batchgen/shards/{shard:05d}.json"
    tree = json.loads(marker.read_bytes())
    marker.write_text(json.dumps({**tree, "files": []}))


def empty_marker(out: Path) -> None:
    (out / "_batchgen/shards/00003.json").write_bytes(b"")


def rewrite_tar(out: Path, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Give shard 3 other members, and make its marker agree with them."""
    with tarfile.open(tar_of(out, 3)) as archive:
        members = [(one.name, archive.extractfile(one).read()) for one in archive]  # type: ignore[union-attr]
    change(members)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    replace_file(out, 3, tar_of(out, 3), sink.getvalue())


def other_image(members: list[tuple[str, bytes]]) -> None:
    members[0] = (members[0][0], members[4][1])


def no_json(members: list[tuple[str, bytes]]) -> None:
    del members[1]


def no_image(members: list[tuple[str, bytes]]) -> None:
    del members[0]


def lost_sample(members: list[tuple[str, bytes]]) -> None:
    del members[:4]


def double_sample(members: list[tuple[str, bytes]]) -> None:
    members += members[:4]


Damage = Callable[[Path], Any]
LISTED: list[tuple[str, Damage, str]] = [
    ("webdataset", lambda out: tar_of(out, 2).unlink(), "data/00002.tar: "),
    ("webdataset", lambda out: tar_of(out, 2).write_bytes(b""), "data/00002.tar: "),
    (
        "webdataset",
        lambda out: shutil.copy(tar_of(out, 0), tar_of(out, 7)),
        "data/00007.tar belongs to no committed shard",
    ),
    ("webdataset", lambda out: name_no_data(out, 3), "shard 3: its marker names no data file"),
    ("webdataset", empty_marker, "00003.json is damaged"),
    ("image-folder", lambda out: image_of(out, 2).unlink(), "data/1/00002/a-00000007-v0.png: "),
    (
        "image-folder",
        lambda out: metadata_of(out, 2).write_bytes(b""),
        "data/1/00002/metadata.jsonl: ",
    ),
    (
        "image-folder",
        lambda out: shutil.copy(image_of(out, 0), image_of(out, 0).with_name("b.png")),
        "data/0/00000/b.png belongs to no committed shard",
    ),
    (
        "image-folder",
        lambda out: shutil.copytree(out / "data/0/00000", out / "data/new/00000"),
        "data/new/00000/metadata.jsonl belongs to no committed shard",
    ),
    ("image-folder", lambda out: name_no_data(out, 3), "shard 3: its files hold 0 accepted"),
    ("image-folder", empty_marker, "00003.json is damaged"),
    *(
        (
            name,
            lambda out: next((out / "_batchgen/schemas").iterdir()).unlink(),
            ".arrow: ",
        )
        for name in ("webdataset", "image-folder")
    ),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("name", "damage", "problem"), LISTED)
def test_damage_that_listings_and_markers_show(
    name: str, damage: Damage, problem: str, quick: bool, out: Callable[[str], Path]
) -> None:
    folder = out(name)
    damage(folder)
    found = findings(folder, quick)
    assert any(problem in text for text in found.problems), found.problems


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap_image(out: Path) -> None:
    replace_file(out, 3, image_of(out, 3), image_of(out, 0).read_bytes())


def edit_metadata(out: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = metadata_of(out, 3)
    rows = [json.loads(one) for one in path.read_bytes().splitlines()]
    change(rows)
    replace_file(out, 3, path, b"".join(line(row) + b"\n" for row in rows))


READ: list[tuple[str, Damage, str]] = [
    (
        "webdataset",
        lambda out: flip(tar_of(out, 2)),
        "00002.tar: content does not match the checksum in _batchgen",
    ),
    (
        "webdataset",
        lambda out: rewrite_tar(out, other_image),
        "image a-00000009-v0 does not match its sha256",
    ),
    (
        "webdataset",
        lambda out: rewrite_tar(out, no_json),
        "a-00000009-v0 has no a-",
    ),
    ("webdataset", lambda out: rewrite_tar(out, no_image), "a-00000009-v0 has 0 images"),
    (
        "webdataset",
        lambda out: rewrite_tar(out, lost_sample),
        "planned sample ('a.parquet#9', 0) is missing",
    ),
    ("webdataset", lambda out: rewrite_tar(out, double_sample), "shard 3: a sample occurs twice"),
    (
        "webdataset",
        lambda out: replace_file(out, 3, tar_of(out, 3), b"no tar"),
        "shard 3: its tar is damaged or incomplete",
    ),
    (
        "image-folder",
        lambda out: flip(image_of(out, 2)),
        "a-00000007-v0.png: content does not match",
    ),
    ("image-folder", swap_image, "image a-00000009-v0 does not match its sha256 column"),
    (
        "image-folder",
        lambda out: edit_metadata(out, lambda rows: rows[0].update(sha256="0" * 64)),
        "image a-00000009-v0 does not match its sha256 column",
    ),
    (
        "image-folder",
        lambda out: edit_metadata(out, lambda rows: rows[0].update(source_id="a.parquet#0")),
        "shard 3: sample ('a.parquet#0', 0) was never planned",
    ),
    (
        "image-folder",
        lambda out: edit_metadata(out, lambda rows: rows.pop(0)),
        "a-00000009-v0.png is not listed in the metadata.jsonl of its folder",
    ),
    (
        "image-folder",
        lambda out: edit_metadata(out, lambda rows: rows.append(rows[0])),
        "a-00000009-v0.png is listed twice",
    ),
]


@pytest.mark.parametrize(("name", "damage", "problem"), READ)
def test_damage_that_only_reading_shows(
    name: str, damage: Damage, problem: str, out: Callable[[str], Path]
) -> None:
    folder = out(name)
    damage(folder)
    found = findings(folder)
    assert any(problem in text for text in found.problems), found.problems
    assert findings(folder, quick=True).ok


def test_a_lost_image_is_one_problem(out: Callable[[str], Path]) -> None:
    folder = out("image-folder")
    image_of(folder, 2).unlink()
    assert len(findings(folder).problems) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_an_interrupted_run_is_mended(name: str, out: Callable[[str], Path]) -> None:
    folder = out(name)
    before = {path: path.read_bytes() for path in files_of(folder)}
    (folder / "_batchgen/shards/00002.json").unlink()
    for path in list(before)[-3:]:
        path.unlink()
    for shard in (0, 1, 3):
        (folder / f"_batchgen/shards/{shard:05d}.json").unlink()
    ledger = Ledger(open_store(str(folder)))
    make_output(ledger.require_plan(), ledger)
    assert {path: path.read_bytes() for path in files_of(folder)} == before
    assert findings(folder).problems == []
