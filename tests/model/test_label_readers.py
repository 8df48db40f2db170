"""Exported labels are read back by the programs that people train with: counts and boxes agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import supervision
import webdataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from batchgen.labels.rle import drawn
from batchgen.output.datasets.choose import LAYOUTS, export_to
from batchgen.output.formats import FORMATS
from batchgen.output.ledger import Ledger
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests.labelled_outputs import (
    CATEGORIES,
    EMPTY_ROW,
    HEIGHT,
    SPLITS,
    VOID_ROW,
    WIDTH,
    labelled_output,
    mask_of,
    objects_of,
    write_source,
)

# Rows of the split train: 0 and 4, 8 (split "train"), and 3, 7, 11 (no split).
TRAIN = [row for row in range(12) if SPLITS[row % 4] in ("train", "") and row != VOID_ROW]
LABELS = ["ant", "bee", "cat"]
SEGMENTS = "yolo with segments"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with labels in each format, and each layout of the first."""
    folder = tmp_path_factory.mktemp("readers")
    source = write_source(folder / "a.parquet")
    for name in FORMATS:
        ledger = labelled_output(
            source, folder / name, "objects", "label_mask", output__format=name
        )
        plan = ledger.require_plan()
        finalize(plan, ledger, Tally(plan.shards, plan.samples))
    ledger = Ledger(open_store(str(folder / "parquet")))
    for layout in LAYOUTS:
        export_to(ledger, open_store(str(folder / layout)), layout)
    export_to(ledger, open_store(str(folder / SEGMENTS)), "yolo", segments=True)
    return folder


def row_of(name: str) -> int:
    return int(Path(name).name.split("-")[1])


def boxes_of(row: int, crowds: bool = True) -> list[list[float]]:
    """The boxes of a row's objects as x0, y0, x1, y1."""
    objects = objects_of(row)
    pairs = zip(objects["bbox"], objects["iscrowd"], strict=True)
    return [[x, y, x + w, y + h] for (x, y, w, h), crowd in pairs if crowds or not crowd]


def classes_of(row: int, crowds: bool = True) -> list[str]:
    objects = objects_of(row)
    pairs = zip(objects["category"], objects["iscrowd"], strict=True)
    return [str(CATEGORIES[number]["name"]) for number, crowd in pairs if crowds or not crowd]


# COCO


@pytest.fixture(scope="module")
def coco(whole: Path) -> COCO:
    with redirect_stdout(StringIO()):
        return COCO(whole / "coco/annotations/instances_train.json")


def test_pycocotools_has_the_images_and_objects(coco: COCO) -> None:
    assert sorted(coco.getImgIds()) == [row + 1 for row in TRAIN]
    assert {one["id"]: one["name"] for one in coco.loadCats(coco.getCatIds())} == {
        one["id"]: one["name"] for one in CATEGORIES
    }
    for image in coco.loadImgs(coco.getImgIds()):
        row = row_of(image["file_name"])
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        objects = objects_of(row)
        assert [one["bbox"] for one in found] == objects["bbox"]
        assert [one["source_id"] for one in found] == objects["id"]
        names = {one["id"]: one["name"] for one in CATEGORIES}
        assert [names[one["category_id"]] for one in found] == classes_of(row)


def test_pycocotools_draws_polygons_and_masks(coco: COCO) -> None:
    found = coco.loadAnns(coco.getAnnIds(imgIds=1))
    objects = objects_of(0)
    for place in (0, 1):
        wanted = drawn(objects["segmentation"][place], (WIDTH, HEIGHT))
        assert (coco.annToMask(found[place]) == wanted).all()
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    crowd[1:3, 9:13] = True
    assert (coco.annToMask(found[2]) == crowd).all()
    assert coco.getAnnIds(iscrowd=True, imgIds=1) == [found[2]["id"]]


@pytest.mark.parametrize(("kind", "score"), [("bbox", 1.0), ("segm", 1.0)])
def test_cocoeval_scores_the_labels_against_themselves(kind: str, score: float, coco: COCO) -> None:
    """Ids that are 0 or not unique would cost matches."""
    results = [
        {**one, "segmentation": rle_of(coco, one), "score": 0.9}
        for one in coco.dataset["annotations"]
        if not one["iscrowd"]
    ]
    with redirect_stdout(StringIO()):
        found = COCOeval(coco, coco.loadRes(results), kind)
        found.evaluate()
        found.accumulate()
        found.summarize()
    assert found.stats[0] == pytest.approx(score)


def rle_of(coco: COCO, annotation: dict[str, Any]) -> Any:
    return coco.annToRLE(annotation)


def test_cocoeval_scores_keypoints(whole: Path, coco: COCO) -> None:
    with redirect_stdout(StringIO()):
        results = [
            {**one, "score": 0.9} for one in coco.dataset["annotations"] if "keypoints" in one
        ]
        found = COCOeval(coco, coco.loadRes(results), "keypoints")
        found.params.kpt_oks_sigmas = np.array([0.05, 0.05])
        found.params.areaRng, found.params.areaRngLbl = [[0, 1e10]], ["all"]
        found.params.catIds = [7]
        found.evaluate()
        found.accumulate()
    assert found.eval["precision"].mean() == pytest.approx(1.0)


def test_supervision_reads_coco(whole: Path) -> None:
    found = supervision.DetectionDataset.from_coco(
        str(whole / "coco/images/train"),
        str(whole / "coco/annotations/instances_train.json"),
        force_masks=True,
    )
    by_id = sorted(CATEGORIES, key=lambda one: int(str(one["id"])))
    assert found.classes == [one["name"] for one in by_id]
    assert sorted(row_of(path) for path, _, _ in found) == TRAIN
    for path, image, labels in found:
        row = row_of(path)
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert labels.xyxy.tolist() == boxes_of(row)
        assert [found.classes[number] for number in labels.class_id] == classes_of(row)
        if row != EMPTY_ROW:
            assert labels.mask[2].sum() == 8  # the crowd


# YOLO and VOC


@pytest.mark.parametrize("layout", ["yolo", SEGMENTS])
def test_supervision_reads_yolo(layout: str, whole: Path) -> None:
    folder = whole / layout
    found = supervision.DetectionDataset.from_yolo(
        str(folder / "images/train"), str(folder / "labels/train"), str(folder / "data.yaml")
    )
    assert found.classes == [one["name"] for one in CATEGORIES]
    assert sorted(row_of(path) for path, _, _ in found) == TRAIN
    for path, _, labels in found:
        row = row_of(path)
        wanted = boxes_of(row, crowds=False)
        assert len(labels) == len(wanted)
        assert np.allclose(labels.xyxy, np.array(wanted).reshape(-1, 4), atol=1e-4)
        assert [found.classes[number] for number in labels.class_id] == classes_of(
            row, crowds=False
        )
        if layout == SEGMENTS and row != EMPTY_ROW:
            assert labels.mask is not None and labels.mask.shape == (2, HEIGHT, WIDTH)


def test_supervision_reads_pascal_voc(whole: Path) -> None:
    found = supervision.DetectionDataset.from_pascal_voc(
        str(whole / "voc/JPEGImages"), str(whole / "voc/Annotations")
    )
    rows = {row_of(path): labels for path, _, labels in found}
    assert sorted(rows) == [row for row in range(12) if row != VOID_ROW]
    for row, labels in rows.items():
        assert len(labels) == len(boxes_of(row))
        wanted = np.array(boxes_of(row)).reshape(-1, 4)
        assert np.abs(labels.xyxy - wanted).max(initial=0.0) <= 0.5
        assert [found.classes[number] for number in labels.class_id] == classes_of(row)


# The formats of outputs


def as_the_card_says(out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {"cache": str(cache)}
    exec(code.replace("split=", "cache_dir=cache, split="), scope)
    return scope["images"]


@pytest.mark.parametrize("name", FORMATS)
def test_hugging_face_has_the_names_of_the_labels_in_every_format(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_the_card_says(whole / name, tmp_path, monkeypatch)
    column = "cls" if name == "webdataset" else "label"
    assert images.features[column] == datasets.ClassLabel(names=LABELS)
    rows = [row["json"] if name == "webdataset" else row for row in images]
    for row, label in zip(rows, images[column], strict=True):
        assert label == int(row["source_id"].partition("#")[2]) % 3


@pytest.mark.parametrize("name", FORMATS)
def test_hugging_face_has_boxes_and_masks_in_every_format(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_the_card_says(whole / name, tmp_path, monkeypatch)
    assert len(images) == 12
    for one in images:
        row = one["json"] if name == "webdataset" else one
        number = row_of(row["key"])
        mask = one["seg.png" if name == "webdataset" else "label_mask"]
        if number == VOID_ROW:
            assert row["objects"] is None and mask is None
            continue
        wanted = objects_of(number)
        for field in ("bbox", "category", "id", "iscrowd"):
            assert row["objects"][field] == wanted[field]
        shapes = [one or None for one in row["objects"]["segmentation"]]  # [] is none in a folder
        assert shapes == wanted["segmentation"]
        masks = [one if one and one["counts"] else None for one in row["objects"]["rle"]]
        assert masks == wanted["rle"]
        assert mask.mode == "L" and (np.asarray(mask) == pixels(mask_of(number))).all()


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(png)))


def test_parquet_names_the_categories(whole: Path, tmp_path: Path) -> None:
    files = str(whole / "parquet/data/*.parquet")
    images = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path)
    names = [one["name"] for one in CATEGORIES]
    assert images.features["objects"]["category"].feature == datasets.ClassLabel(names=names)


def test_webdataset_has_masks_as_files(whole: Path) -> None:
    url = str(whole / "webdataset/data/{00000..00002}.tar")
    rows = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil"))
    assert len(rows) == 12
    for row in rows:
        number = row_of(row["__key__"])
        assert ("seg.png" in row) == (number != VOID_ROW)
        assert "label_mask" not in row["json"] or row["json"]["label_mask"] is None
        if number != VOID_ROW:
            assert row["json"]["objects"]["bbox"] == objects_of(number)["bbox"]
            assert (np.asarray(row["seg.png"])[..., 0] == pixels(mask_of(number))).all()


def test_an_image_folder_shows_classes_only_images(whole: Path) -> None:
    """torchvision's ImageFolder takes files by their extension, in any folder of a class."""
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    files = [path for path in (whole / "image-folder/data").rglob("*") if path.is_file()]
    images = [path for path in files if path.name.lower().endswith(extensions)]
    assert len(images) == 12
    assert sum(path.name.endswith(".seg.apng") for path in files) == 11


def lines_of(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "data").rglob("metadata.jsonl")):
        yield from map(json.loads, path.read_bytes().splitlines())


def test_pyarrow_reads_the_metadata_of_an_image_folder_as_it_is(whole: Path) -> None:
    """Its reader loses nulls at the beginning of a list, so that values move to other objects."""
    import pyarrow.json

    for path in sorted((whole / "image-folder/data").rglob("metadata.jsonl")):
        table = pyarrow.json.read_json(path)
        table.validate(full=True)
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        for found, row in zip(table.to_pylist(), rows, strict=True):
            objects = row["objects"] or {}
            assert all(
                found["objects"][name] == objects[name] for name in ("bbox", "id") if objects
            )
