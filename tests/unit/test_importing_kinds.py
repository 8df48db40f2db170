"""Each kind of source becomes rows with the same columns: keys, images, labels, objects, splits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchgen.errors import InputError
from batchgen.importing.kinds.choose import KINDS, kind_of
from batchgen.importing.listing import file_keys, listed
from batchgen.importing.summary import Summary
from batchgen.importing.target import target_at
from batchgen.importing.work import import_source, source_at
from batchgen.labels.rle import encoded
from batchgen.plan.keys import is_safe
from jobs import import_sources
from tests.datasets_on_disk import png
from tests.fuzzing import fuzz

DRAWINGS = import_sources.drawings()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    import_sources.main(folder)
    return folder


def imported(
    source: Path, out: Path, kind: str | None = None, **how: Any
) -> tuple[Summary, list[dict[str, Any]]]:
    """Import a source; returns the summary and the rows."""
    summary = import_source(source_at(str(source), kind, **how), target_at(str(out)))
    return summary, pq.read_table(out).to_pylist()


def metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hugging Face's features, and what batchgen says about the columns."""
    told = pq.read_schema(path).metadata
    return json.loads(told[b"huggingface"])["info"]["features"], json.loads(told[b"batchgen"])


EXPECTED = {
    "digits": ("image-folder", 40),
    "coco": ("coco", 12),
    "yolo": ("yolo", 12),
    "voc": ("voc", 12),
    "webdataset": ("webdataset", 12),
    "prompts.csv": ("csv", 11),
    "prompts.jsonl": ("jsonl", 12),
    "prompts.txt": ("text", 12),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_kind_is_guessed_and_every_row_is_there(
    name: str, sources: Path, tmp_path: Path
) -> None:
    kind, count = EXPECTED[name]
    summary, rows = imported(sources / name, tmp_path / "out.parquet")
    assert (summary.kind, summary.rows, summary.rejected) == (kind, count, 0)
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == count and all(map(is_safe, keys))
    assert summary.rejects is None and not (tmp_path / "out-rejects.parquet").exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_no_other_kind_fits_before_the_right_one(name: str, sources: Path) -> None:
    found = kind_of(listed(str(sources / name)))
    assert found is not None and found.name == EXPECTED[name][0]


@pytest.mark.parametrize("name", ["coco", "yolo", "voc"])
def test_boxes_lie_where_the_shapes_are_drawn(name: str, sources: Path, tmp_path: Path) -> None:
    _, rows = imported(sources / name, tmp_path / "out.parquet")
    assert len(rows) == len(DRAWINGS)
    by_name = {Path(row["file_name"]).stem: row for row in rows}
    for drawing in DRAWINGS:
        row = by_name[drawing.name]
        objects = row["objects"]
        boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in (s.box for s in drawing.shapes)]
        assert [pytest.approx(box, abs=1e-9) for box in boxes] == objects["bbox"]
        kinds = [import_sources.SHAPES.index(shape.kind) for shape in drawing.shapes]
        assert objects["category"] == kinds
        assert row["split"] == {"train": "train", "val": "validation"}[drawing.split]
        assert row["image"]["bytes"] == drawing.png()
        assert (row["image_width"], row["image_height"]) == (32, 32)


def test_coco_keeps_ids_polygons_and_categories(sources: Path, tmp_path: Path) -> None:
    _, rows = imported(sources / "coco", tmp_path / "out.parquet")
    ids = [one for row in rows for one in row["objects"]["id"]]
    assert sorted(ids) == list(range(1, 19))
    assert {row["image_id"] for row in rows} == set(range(1, 13))
    for row in rows:
        drawing = DRAWINGS[row["image_id"] - 1]
        polygons = [[shape.polygon] for shape in drawing.shapes]
        assert row["objects"]["segmentation"] == polygons
    features, told = metadata(tmp_path / "out.parquet")
    assert told["categories"] == [
        {"name": "circle", "id": 10, "supercategory": "shape"},
        {"name": "square", "id": 20, "supercategory": "shape"},
        {"name": "triangle", "id": 30, "supercategory": "shape"},
    ]
    assert features["objects"]["category"] == {
        "feature": {"names": ["circle", "square", "triangle"], "_type": "ClassLabel"},
        "_type": "List",
    }
    assert told["columns"] == {
        "key": "key",
        "image": "image",
        "objects": "objects",
        "image_width": "image_width",
        "image_height": "image_height",
    }


def test_voc_masks_are_kept_as_they_are(sources: Path, tmp_path: Path) -> None:
    _, rows = imported(sources / "voc", tmp_path / "out.parquet")
    for drawing, row in zip(DRAWINGS, rows, strict=True):
        assert row["label_mask"]["bytes"] == drawing.mask()
    features, told = metadata(tmp_path / "out.parquet")
    assert features["label_mask"] == {"_type": "Image"}
    assert told["columns"]["label_mask"] == "label_mask"
    names = [one["name"] for one in told["mask_classes"]]
    assert names == ["_background_", *import_sources.SHAPES]


def test_masks_of_voc_have_its_classes_after_a_background(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages", "SegmentationClass"):
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / "JPEGImages" / "1.png").write_bytes(png(20, 10))
    (tmp_path / "in" / "SegmentationClass" / "1.png").write_bytes(png(20, 10))
    text = "<object><name>cat</name><bndbox>{}</bndbox></object>".format(
        "".join(f"<{side}>5</{side}>" for side in ("xmin", "ymin", "xmax", "ymax"))
    )
    xml = f"<annotation>{text}</annotation>"
    (tmp_path / "in" / "Annotations" / "1.xml").write_text(xml)
    _, (row,) = imported(tmp_path / "in", tmp_path / "out.parquet")
    _, told = metadata(tmp_path / "out.parquet")
    names = [one["name"] for one in told["mask_classes"]]
    assert len(names) == 21 and (names[0], names[8]) == ("background", "cat")
    assert told["categories"][row["objects"]["category"][0]]["name"] == "cat"


def test_class_folders_are_labels_and_splits(sources: Path, tmp_path: Path) -> None:
    summary, rows = imported(sources / "digits", tmp_path / "out.parquet")
    features, told = metadata(tmp_path / "out.parquet")
    names = features["label"]["names"]
    assert names == sorted(import_sources.DIGITS) and features["label"]["_type"] == "ClassLabel"
    for row in rows:
        split, label, _ = row["file_name"].split("/")
        assert (row["split"], names[row["label"]]) == (split, label)
    assert summary.classes == dict.fromkeys(names, 4)
    assert summary.splits == {"train": 30, "validation": 10}
    assert told["columns"] == {"key": "key", "image": "image", "label": "label"}


def test_folders_without_splits_are_classes(tmp_path: Path) -> None:
    for name in ("train/1.png", "bus/2.png", "bus/old/3.png", "4.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png())
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    features, _ = metadata(tmp_path / "out.parquet")
    names = features["label"]["names"]
    found = {row["file_name"]: row["label"] and names[row["label"]] for row in rows}
    assert names == ["bus", "bus/old", "train"]
    assert found["4.png"] is None and found["train/1.png"] == "train"
    assert "split" not in rows[0] and summary.splits == {}


def test_an_image_in_no_folder_does_not_turn_splits_into_classes(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "val/cat/2.png", "preview.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png())
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert summary.splits == {"train": 1, "validation": 1} and summary.classes == {"cat": 2}
    found = {row["file_name"]: (row["split"], row["label"]) for row in rows}
    assert found["preview.png"] == (None, None)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.csv", "README.md", "LICENSE"], "csv"),
        (["a.jsonl", "licence.txt"], "jsonl"),
        (["00000.tar", "00000.parquet", "00000_stats.json"], "webdataset"),
        (["README.md"], None),
        (["a.csv", "b.xyz"], None),
        (["a.parquet", "dataset_info.json"], "parquet"),
        (["photos/1.JPG", "photos/notes.txt"], "image-folder"),
    ],
)
def test_texts_about_a_source_do_not_hide_its_kind(
    names: list[str], kind: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = kind_of(listed(str(tmp_path)))
    assert (found and found.name) == kind


def test_metadata_gives_columns_by_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "train"
    folder.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(png())
    boxes = {"bbox": [[1, 2, 3, 4]], "categories": ["cat"]}
    lines = [
        {"file_name": "2.png", "prompt": "two", "objects": boxes},
        {"file_name": "3.png", "prompt": "three", "objects": None},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert summary.reasons == {"missing-image": 1}
    assert "3.png" in summary.examples["missing-image"] and "line 2" in str(summary.examples)
    first, second = rows
    assert (first["prompt"], second["prompt"]) == (None, "two")
    assert second["objects"] == {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [0]}
    assert first["objects"] == {"bbox": [], "category": []}
    features, told = metadata(tmp_path / "out.parquet")
    assert told["columns"]["prompt"] == "prompt"
    assert features["objects"]["category"]["feature"]["names"] == ["cat"]


def test_metadata_as_csv(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png())
    (tmp_path / "in" / "metadata.csv").write_text("file_name,caption,strength\n1.png,a cat,0.5\n")
    _, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert (rows[0]["caption"], rows[0]["strength"]) == ("a cat", 0.5)
    _, told = metadata(tmp_path / "out.parquet")
    assert told["columns"]["prompt"] == "caption" and told["columns"]["strength"] == "strength"


def test_a_list_of_classes(sources: Path, tmp_path: Path) -> None:
    _, rows = imported(sources / "classes.txt", tmp_path / "out.parquet", "classes")
    assert [row["class_name"] for row in rows] == list(import_sources.DIGITS)
    assert [row["label"] for row in rows] == list(range(10))
    assert rows[3]["prompt"] == "a photo of a three" and rows[3]["key"] == "three"
    features, told = metadata(tmp_path / "out.parquet")
    assert features["label"]["names"] == list(import_sources.DIGITS)
    assert told["columns"]["class_label"] == "class_name"
    prompt = "the digit {label}"
    _, rows = imported(sources / "classes.txt", tmp_path / "b.parquet", "classes", prompt=prompt)
    assert rows[3]["prompt"] == "the digit three"


def test_classes_that_occur_twice_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("cat\n\ndog\ncat\n")
    summary, rows = imported(tmp_path / "c.txt", tmp_path / "out.parquet", "classes")
    assert [row["class_name"] for row in rows] == ["cat", "dog"]
    assert summary.reasons == {"duplicate-key": 1} and "line 4" in str(summary.examples)


def test_prompts_from_the_names_of_classes(sources: Path, tmp_path: Path) -> None:
    how = {"prompt": "the digit {label}"}
    _, rows = imported(sources / "digits", tmp_path / "out.parquet", **how)
    assert {row["prompt"] for row in rows} == {
        f"the digit {name}" for name in import_sources.DIGITS
    }
    _, told = metadata(tmp_path / "out.parquet")
    assert told["columns"]["prompt"] == "prompt"


def test_images_by_reference_have_an_absolute_path(sources: Path, tmp_path: Path) -> None:
    summary, rows = imported(sources / "digits", tmp_path / "out.parquet", images="reference")
    for row in rows:
        assert row["image"]["bytes"] is None
        assert Path(row["image"]["path"]) == sources / "digits" / row["file_name"]
    assert summary.roots == [str(sources / "digits")]


def test_one_json_of_coco_finds_the_images_around_it(sources: Path, tmp_path: Path) -> None:
    summary, _ = imported(
        sources / "coco" / "annotations" / "instances_val.json", tmp_path / "out.parquet"
    )
    assert (summary.rows, summary.splits) == (3, {"validation": 3})


def test_the_image_root_of_a_json_elsewhere(sources: Path, tmp_path: Path) -> None:
    text = (sources / "coco" / "annotations" / "instances_val.json").read_text()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "labels.json").write_text(text)
    with pytest.raises(InputError, match=r"missing-image.*--image-root"):
        imported(tmp_path / "in" / "labels.json", tmp_path / "out.parquet")
    how = {"image_root": str(sources / "coco" / "val")}
    summary, _ = imported(tmp_path / "in" / "labels.json", tmp_path / "out.parquet", **how)
    assert summary.rows == 3


def test_files_at_a_url(sources: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    base = f"/bucket{abs(hash(str(tmp_path)))}"
    memory.put(str(sources / "digits"), f"{base}/digits", recursive=True)
    summary, rows = _at_url(f"memory:/{base}/digits", tmp_path / "out.parquet")
    assert summary.rows == 40 and summary.images_are == "reference"
    assert summary.roots == [f"memory://{base}/digits"]
    assert rows[0]["image"]["path"] == f"{summary.roots[0]}/{rows[0]['file_name']}"
    summary, rows = _at_url(f"memory:/{base}/digits", tmp_path / "b.parquet", images="bytes")
    assert rows[0]["image"]["bytes"]


def _at_url(url: str, out: Path, **how: Any) -> tuple[Summary, list[dict[str, Any]]]:
    summary = import_source(source_at(url, **how), target_at(str(out)))
    return summary, pq.read_table(out).to_pylist()


def test_parquet_passes_through_with_keys_splits_and_parts(tmp_path: Path) -> None:
    image = {"bytes": png(), "path": "a.png"}
    features = {
        "img": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table(
        {
            "img": pa.array(
                [image] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            ),
            "label": [0, 1, 1],
            "text": ["a", "b", "c"],
            "time": pa.array([1, 2, 3], pa.timestamp("ns")),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split in ("train", "test"):
        (tmp_path / "in" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "in" / "data" / f"{split}-00000-of-00001.parquet")
    summary, _ = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert summary.kind == "parquet" and summary.splits == {"test": 3, "train": 3}
    read = pq.read_table(tmp_path / "out.parquet")
    assert read.schema.field("time").type == pa.timestamp("ns")
    assert read.column("time").to_numpy().tolist() == [1, 2, 3] * 2
    features, told = metadata(tmp_path / "out.parquet")
    assert features["label"]["names"] == ["cat", "dog"] and features["img"] == {"_type": "Image"}
    expected = {"key": "key", "image": "img", "prompt": "text", "label": "label"}
    assert told["columns"] == expected
    assert len(set(read.column("key").to_pylist())) == 6
    assert summary.classes == {"cat": 2, "dog": 4}


def test_an_arrow_folder_as_save_to_disk_writes_it(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    (tmp_path / "in" / "train").mkdir(parents=True)
    path = str(tmp_path / "in" / "train" / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "in" / "train" / "state.json").write_text("{}")
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert [row["text"] for row in rows] == ["a", "b"] and summary.splits == {"train": 2}


def test_an_import_of_an_import_keeps_what_is_declared(sources: Path, tmp_path: Path) -> None:
    imported(sources / "coco", tmp_path / "a.parquet")
    summary, rows = imported(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert summary.objects == 18
    assert metadata(tmp_path / "b.parquet") == metadata(tmp_path / "a.parquet")
    assert rows == pq.read_table(tmp_path / "a.parquet").to_pylist()


def test_keys_of_parquet_are_made_safe_and_unique(tmp_path: Path) -> None:
    keys = ["a", "b c", "a", None, "d"]
    pq.write_table(pa.table({"key": keys, "n": range(5)}), tmp_path / "in.parquet")
    summary, rows = imported(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert [row["n"] for row in rows] == [0, 1, 4]
    assert summary.reasons == {"bad-value": 1, "duplicate-key": 1}
    assert "in.parquet row 3" in summary.examples["bad-value"]


def test_keys_of_files_do_not_depend_on_their_order() -> None:
    names = ["cat/1.png", "cat-1.png", "dog/1.png", "dog/1.jpg", "a b.png", "x.png"]
    keys = file_keys(names)
    assert len(set(keys.values())) == len(names) and all(map(is_safe, keys.values()))
    assert keys == file_keys(sorted(names, reverse=True))
    assert keys["x.png"] == "x" and keys["cat/1.png"] != "cat-1"


def turned(size: tuple[int, int], orientation: int) -> bytes:
    """A JPEG whose EXIF orientation turns it."""
    image = Image.new("RGB", size)
    exif = image.getexif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    image.save(sink, "JPEG", exif=exif)
    return sink.getvalue()


def coco_of(folder: Path, image: dict[str, Any], box: list[float]) -> None:
    (folder / "annotations").mkdir(parents=True)
    tree = {
        "images": [{"id": 1, "file_name": "1.jpg", **image}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "annotations" / "instances.json").write_text(json.dumps(tree))


def test_labels_are_about_the_image_as_one_sees_it(tmp_path: Path) -> None:
    coco_of(tmp_path / "a", {"width": 20, "height": 40}, [0, 0, 20, 40])
    coco_of(tmp_path / "b", {"width": 40, "height": 20}, [0, 0, 40, 20])
    for name in ("a", "b"):
        (tmp_path / name / "1.jpg").write_bytes(turned((40, 20), 6))
    summary, _ = imported(tmp_path / "a", tmp_path / "a.parquet")
    assert summary.rows == 1
    with pytest.raises(InputError, match="EXIF orientation"):
        imported(tmp_path / "b", tmp_path / "b.parquet")


WIDTH, HEIGHT = 40, 30
POINTS = st.tuples(st.integers(0, WIDTH), st.integers(0, HEIGHT))


@st.composite
def annotations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Annotations of one image, each as COCO allows it."""
    found = []
    for number in range(draw(st.integers(0, 4))):
        x, y = draw(st.floats(0, WIDTH - 2)), draw(st.floats(0, HEIGHT - 2))
        width, height = draw(st.floats(0.5, WIDTH - x)), draw(st.floats(0.5, HEIGHT - y))
        one: dict[str, Any] = {
            "id": draw(st.integers(0, 2**40)) * 8 + number,
            "image_id": 7,
            "category_id": draw(st.sampled_from([3, 90])),
            "bbox": [x, y, width, height],
            "area": draw(st.floats(0, 1e6)),
            "iscrowd": 0,
            "segmentation": [],
        }
        if draw(st.booleans()):
            polygons = draw(st.lists(st.lists(POINTS, min_size=3, max_size=5), max_size=2))
            flat = [[float(one) for point in polygon for one in point] for polygon in polygons]
            one["segmentation"] = flat
        else:
            pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
            pixels[draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1)) :] = True
            rle = encoded(pixels)
            one |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle.counts}}
        if draw(st.booleans()):
            points = draw(st.lists(POINTS, min_size=2, max_size=2))
            one["keypoints"] = [float(one) for point in points for one in (*point, 2)]
            one["num_keypoints"] = 2
        found.append(one)
    return found


CATEGORIES = [
    {"id": 3, "name": "cat", "supercategory": "animal"},
    {"id": 90, "name": "person", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]},
]


@fuzz(quick=50)
@given(found=annotations())
def test_coco_loses_nothing(
    found: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("coco") / "in"
    (folder / "annotations").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(WIDTH, HEIGHT))
    image = {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT, "license": 2}
    tree = {"images": [image], "annotations": found, "categories": CATEGORIES, "info": {"y": 1}}
    (folder / "annotations" / "instances.json").write_text(json.dumps(tree))
    _, (row,) = imported(folder, folder.parent / "out.parquet")
    _, told = metadata(folder.parent / "out.parquet")
    assert told["categories"] == CATEGORIES and told["source"] == {"info": {"y": 1}}
    assert (row["image_id"], row["license"], row["file_name"]) == (7, 2, "a.png")
    objects = row["objects"]
    for number, one in enumerate(found):
        read = {name: values[number] for name, values in objects.items()}
        expected = {name: one.get(name) for name in read.keys() - {"category", "rle"}}
        expected["segmentation"] = None
        if isinstance(one["segmentation"], dict):
            assert read.pop("rle") == one["segmentation"]
        else:
            assert read.pop("rle", None) is None
            expected["segmentation"] = one["segmentation"] or None
        assert [3, 90][read.pop("category")] == one["category_id"]
        assert read == {name: expected[name] for name in read}
    assert all(len(values) == len(found) for values in objects.values())


def test_coco_as_roboflow_writes_it(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(20, 10))
        tree = {
            "images": [{"id": 0, "file_name": "a.png", "width": 20, "height": 10}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}],
            "categories": [{"id": 0, "name": "pets"}, {"id": 1, "name": "cat"}],
        }
        (folder / "_annotations.coco.json").write_text(json.dumps(tree))
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert (summary.kind, summary.splits) == ("coco", {"train": 1, "validation": 1})
    assert [row["image"]["path"] for row in rows] == ["train/a.png", "valid/a.png"]
    assert len({row["key"] for row in rows}) == 2


def test_captions_and_keypoints_of_the_same_images_are_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    (folder / "val2017" / "a.png").write_bytes(png(20, 10))
    images = [{"id": 5, "file_name": "a.png", "width": 20, "height": 10}]
    box = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 1, 5, 5]}
    person = {"id": 1, "name": "person"}
    points = {**person, "keypoints": ["nose"], "skeleton": []}
    captions = [
        {"id": 9, "image_id": 5, "caption": "one "},
        {"id": 8, "image_id": 5, "caption": "b"},
    ]
    trees = {
        "instances": {"annotations": [box], "categories": [person]},
        "person_keypoints": {
            "annotations": [{**box, "keypoints": [1, 2, 2], "num_keypoints": 1}],
            "categories": [points],
        },
        "captions": {"annotations": captions},
    }
    for name, tree in trees.items():
        path = folder / "annotations" / f"{name}_val2017.json"
        path.write_text(json.dumps({"images": images, **tree}))
    summary, (row,) = imported(folder, tmp_path / "out.parquet")
    assert (row["prompt"], row["captions"]) == ("one", ["one", "b"])
    assert row["objects"]["keypoints"] == [[1, 2, 2]] and row["split"] == "validation"
    _, told = metadata(tmp_path / "out.parquet")
    assert told["categories"] == [{"name": "person", "id": 1, "keypoints": ["nose"]}]
    assert told["columns"]["prompt"] == "prompt" and summary.rejected == 0


def test_yolo_as_roboflow_writes_it(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        for inner in ("images", "labels"):
            (tmp_path / "in" / split / inner).mkdir(parents=True)
        (tmp_path / "in" / split / "images" / "a.png").write_bytes(png(20, 10))
        (tmp_path / "in" / split / "labels" / "a.txt").write_text("1 0.5 0.5 0.5 1\n")
    text = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n"
    (tmp_path / "in" / "data.yaml").write_text(text)
    summary, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert (summary.kind, summary.splits) == ("yolo", {"train": 1, "validation": 1})
    assert rows[0]["objects"] == {"bbox": [[5, 0, 10, 10]], "category": [1]}
    assert summary.rejected == 0 and summary.notes == []


def test_splits_of_voc_by_any_of_their_names(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC2012" / name).mkdir(parents=True)
    root = tmp_path / "VOC2012"
    size = "<size><width>20</width><height>10</height></size>"
    for name in "abcd":
        (root / "JPEGImages" / f"{name}.png").write_bytes(png(20, 10))
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}</annotation>")
    lists = {"trainval": "abc", "validation": "b", "test": "d", "cat_train": "a"}
    for name, ids in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{i} 1\n" for i in ids))
    _, rows = imported(tmp_path / "VOC2012", tmp_path / "out.parquet")
    found = {row["key"]: row["split"] for row in rows}
    assert found == {"a": "train", "b": "validation", "c": "train", "d": "test"}


def test_yolo_boxes_are_fractions_of_the_turned_image(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    (tmp_path / "in" / "images" / "1.jpg").write_bytes(turned((40, 20), 6))
    (tmp_path / "in" / "labels" / "1.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "in" / "data.yaml").write_text("train: images\nnames: [cat]\n")
    _, rows = imported(tmp_path / "in", tmp_path / "out.parquet")
    assert rows[0]["objects"]["bbox"] == [[0, 0, 20, 40]]


def test_yolo_polygons_and_keypoints(tmp_path: Path) -> None:
    for number, (line, more) in enumerate(
        [("0 0 0 1 0 1 0.5", ""), ("0 0.5 0.5 1 1 0.25 0.5 2 0 0 0", "kpt_shape: [2, 3]\n")]
    ):
        folder = tmp_path / f"in{number}"
        for inner in ("images/val", "labels/val"):
            (folder / inner).mkdir(parents=True)
        (folder / "images/val/1.png").write_bytes(png(20, 10))
        (folder / "labels/val/1.txt").write_text(line)
        (folder / "data.yaml").write_text(f"val: images/val\nnames: {{0: cat}}\n{more}")
    _, rows = imported(tmp_path / "in0", tmp_path / "a.parquet")
    assert rows[0]["objects"]["segmentation"] == [[[0, 0, 20, 0, 20, 5]]]
    assert rows[0]["objects"]["bbox"] == [[0, 0, 20, 5]] and rows[0]["split"] == "validation"
    _, rows = imported(tmp_path / "in1", tmp_path / "b.parquet")
    assert rows[0]["objects"]["keypoints"] == [[5, 5, 2, 0, 0, 0]]
    assert rows[0]["objects"]["num_keypoints"] == [1]


def test_every_kind_says_what_it_is() -> None:
    assert list(KINDS)[-2:] == ["classes", "hub"]
    assert all(kind.about for kind in KINDS.values())
