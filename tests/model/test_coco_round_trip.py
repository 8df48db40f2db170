"""A COCO folder is imported, varied by the shipped model, and exported: no label is lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools.coco import COCO

from batchgen.cli import main
from batchgen.labels.rle import encoded
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.build import build
from batchgen.storage import open_store
from tests.in_process import stream

WIDTH, HEIGHT = 48, 32
CATEGORIES = [
    {"id": 3, "name": "shape", "supercategory": "drawn"},
    {
        "id": 17,
        "name": "animal",
        "supercategory": "living",
        "keypoints": ["nose", "tail"],
        "skeleton": [[1, 2]],
    },
]
HEAD = {
    "info": {"description": "drawn for a test", "year": 2026, "contributor": "nobody"},
    "licenses": [{"id": 4, "name": "CC BY 4.0", "url": "https://creativecommons.org/by/4.0/"}],
}


def crowd() -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:9, 30:44] = True
    mask[4:6, 33:36] = False
    found = encoded(mask)
    return {"size": list(found.size), "counts": found.counts}


def annotations_of(image: int) -> list[dict[str, Any]]:
    """A polygon with a field of its own, a crowd, and an object with keypoints and two parts."""
    return [
        {
            "id": 10 * image + 1,
            "image_id": image,
            "category_id": 3,
            "bbox": [4.25, 6.5, 14.0, 12.0],
            "area": 120.75,
            "iscrowd": 0,
            "segmentation": [[4.25, 6.5, 18.25, 6.5, 18.25, 18.5, 4.25, 18.5]],
            "occluded": bool(image % 2),
        },
        {
            "id": 10 * image + 2,
            "image_id": image,
            "category_id": 3,
            "bbox": [30.0, 2.0, 14.0, 7.0],
            "area": 92.0,
            "iscrowd": 1,
            "segmentation": crowd(),
        },
        {
            "id": 10 * image + 3,
            "image_id": image,
            "category_id": 17,
            "bbox": [20.0, 12.0, 20.0, 16.0],
            "area": 200.0,
            "iscrowd": 0,
            "segmentation": [
                [20.0, 12.0, 30.0, 12.0, 30.0, 28.0],
                [32.0, 20.0, 40.0, 20.0, 40.0, 28.0],
            ],
            "keypoints": [22.0, 14.0, 2, 0.0, 0.0, 0],
            "num_keypoints": 1,
        },
    ]


def write_source(folder: Path) -> None:
    """Two splits of two images each; the second image of a split has no objects."""
    for place, split in enumerate(("train", "val")):
        images, annotations = [], []
        for number in (2 * place + 1, 2 * place + 2):
            name = f"{number:04d}.png"
            sink = io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 90, 200)).save(sink, "PNG")
            (folder / split).mkdir(parents=True, exist_ok=True)
            (folder / split / name).write_bytes(sink.getvalue())
            images.append(
                {
                    "id": number,
                    "file_name": name,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "license": 4,
                    "date_captured": "2026-11-27",
                }
            )
            annotations += annotations_of(number) if number % 2 else []
        tree = {**HEAD, "images": images, "annotations": annotations, "categories": CATEGORIES}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))


def command(*words: object) -> None:
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exit_code == 0, found.output


def files_of(split: str, exported: tuple[Path, Path]) -> list[Path]:
    """The annotations of a split, before and after; an import calls `val` as Hugging Face does."""
    after = {"val": "validation"}.get(split, split)
    names = (split, after)
    return [
        folder / "annotations" / f"instances_{name}.json"
        for folder, name in zip(exported, names, strict=True)
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("coco")
    write_source(folder / "source")
    command("import", folder / "source", folder / "in.parquet")
    told = json.loads(pq.read_schema(folder / "in.parquet").metadata[b"batchgen"])
    columns = {part: one for part, one in told["columns"].items() if part != "prompt"}
    tree = {
        "task": "image-to-image",
        "input": {"path": str(folder / "in.parquet"), "columns": {**columns, "prompt": None}},
        "conditioning": {"resize": "multiple-of"},
        "sampling": {"num_inference_steps": 5, "strength": 0.3},
        "resources": {"batch_size": 2},
        "output": {"url": str(folder / "out"), "samples_per_shard": 3},
    }
    stream(build(tree))
    found = verify(Ledger(open_store(str(folder / "out"))))
    assert found.ok, found.problems
    command("export", folder / "out", folder / "coco", "--to", "coco")
    return folder / "source", folder / "coco"


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_that_coco_can_say_is_lost(split: str, exported: tuple[Path, Path]) -> None:
    source, target = (json.loads(file.read_text()) for file in files_of(split, exported))
    assert target["categories"] == source["categories"] == CATEGORIES
    assert target["info"]["source"] == HEAD
    before = {one["file_name"]: one for one in source["images"]}
    after = {one["batchgen"]["source"]["file_name"]: one for one in target["images"]}
    assert {Path(name).name for name in after} == set(before)
    for name, image in after.items():
        told = before[Path(name).name]
        assert (image["width"], image["height"]) == (told["width"], told["height"])
        kept = image["batchgen"]["source"]
        assert kept["license"] == 4 and kept["date_captured"] == told["date_captured"]
        assert kept["image_id"] == told["id"]
        found = [one for one in target["annotations"] if one["image_id"] == image["id"]]
        wanted = [one for one in source["annotations"] if one["image_id"] == told["id"]]
        assert len(found) == len(wanted)
        for new, old in zip(found, wanted, strict=True):
            assert new["source_id"] == old["id"]
            for field in old.keys() - {"id", "image_id"}:
                assert (
                    new[field] == pytest.approx(old[field])
                    if field == "bbox"
                    else (new[field] == old[field])
                ), (field, new, old)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_both_alike(split: str, exported: tuple[Path, Path], capsys: Any) -> None:
    source, target = (COCO(str(file)) for file in files_of(split, exported))
    assert len(target.getImgIds()) == len(source.getImgIds()) == 2
    masks = [
        [sets.annToMask(one) for one in sets.loadAnns(sets.getAnnIds())]
        for sets in (source, target)
    ]
    assert len(masks[0]) == 3
    for old, new in zip(*masks, strict=True):
        assert np.array_equal(old, new)
