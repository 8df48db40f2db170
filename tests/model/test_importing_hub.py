"""Imports are Hugging Face datasets, and datasets that `datasets` streams are imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.importing.kinds.hub import HUB, read_hub
from batchgen.importing.listing import Listing
from batchgen.importing.rows import Dataset, Kind, Options
from batchgen.importing.target import target_at
from batchgen.importing.work import Source, import_source, source_at
from jobs import import_sources
from tests.datasets_on_disk import png


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    import_sources.main(folder)
    return folder


def loaded(path: Path, cache: Path) -> datasets.Dataset:
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, None) for name in ("digits", "coco", "yolo", "voc", "webdataset", "prompts.csv")),
        ("classes.txt", "classes"),
    ],
)
def test_every_import_is_read_by_datasets(
    name: str, kind: str | None, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    summary = import_source(source_at(str(sources / name), kind), target_at(str(out)))
    read = loaded(out, tmp_path / "cache")
    assert len(read) == summary.rows
    for column, feature in read.features.items():
        assert feature is not None, column
    if "image" in read.features:
        assert isinstance(read.features["image"], datasets.Image)
        assert read[0]["image"].size == (32, 32)
    if "label" in read.features:
        assert isinstance(read.features["label"], datasets.ClassLabel)


def test_boxes_and_names_are_those_of_datasets(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    import_source(source_at(str(sources / "coco")), target_at(str(out)))
    read = loaded(out, tmp_path / "cache")
    names = read.features["objects"]["category"].feature.names
    assert names == list(import_sources.SHAPES)
    drawings = {one.name: one for one in import_sources.drawings()}
    for row in read:
        shapes = drawings[Path(row["file_name"]).stem].shapes
        assert [names[one] for one in row["objects"]["category"]] == [one.kind for one in shapes]


def hub(name: str, load: Any) -> Source:
    """A source of the Hub whose splits ``load`` returns."""

    def read(listing: Listing, options: Options) -> Dataset:
        return read_hub(listing.source, load)

    return Source(Listing(name, "", {}), Kind("hub", HUB.about, HUB.fits, read), "bytes")


def streamed(folder: Path) -> Any:
    """The splits of an image folder, as `datasets` streams them."""
    return lambda name: datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=True)


def test_a_streamed_dataset_keeps_images_classes_and_splits(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = import_source(hub("owner/digits", streamed(sources / "digits")), target_at(str(out)))
    assert (summary.kind, summary.rows, summary.images) == ("hub", 40, 40)
    assert summary.splits == {"train": 30, "validation": 10}
    assert summary.classes == dict.fromkeys(sorted(import_sources.DIGITS), 4)
    rows = pq.read_table(out).to_pylist()
    assert len({row["key"] for row in rows}) == 40
    assert {row["key"].rpartition("-")[0] for row in rows} == {"train", "validation"}
    told = json.loads(pq.read_schema(out).metadata[b"batchgen"])
    assert told["columns"] == {"key": "key", "image": "image", "label": "label"}
    assert len(loaded(out, tmp_path / "cache")) == 40


def test_a_local_dataset_of_parquet_by_its_folder(tmp_path: Path) -> None:
    """`datasets` takes a folder for an id, so the real loader is tried without the Hub."""
    rows = {"image": [{"bytes": png(), "path": "a.png"}] * 3, "caption": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "in" / "train.parquet"))
    out = tmp_path / "out.parquet"
    summary = import_source(source_at(str(tmp_path / "in"), "hub"), target_at(str(out)))
    assert (summary.rows, summary.columns["prompt"]) == (3, "caption")
    assert pq.read_table(out).column("image").to_pylist()[0]["bytes"] == png()


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    made = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})}
    ).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    made.save_to_disk(str(tmp_path / "in"))
    out = tmp_path / "out.parquet"
    summary = import_source(source_at(str(tmp_path / "in")), target_at(str(out)))
    assert summary.classes == {"cat": 1, "dog": 1} and summary.splits == {"train": 2}


def test_a_dataset_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset nobody/nothing: \w+"):
        source = source_at("nobody/nothing", "hub")
        import_source(source, target_at(str(tmp_path / "out.parquet")))
