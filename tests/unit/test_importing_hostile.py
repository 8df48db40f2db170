"""Bad sources cost their rows, with a reason and a message that names the place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, InputError
from batchgen.importing import reasons
from batchgen.importing.kinds.elements import read_xml
from batchgen.importing.listing import listed
from batchgen.importing.rows import Refused
from batchgen.importing.summary import Summary
from batchgen.importing.target import target_at
from batchgen.importing.work import import_source, source_at
from jobs import import_sources
from tests.datasets_on_disk import png
from tests.fuzzing import fuzz

Tree = dict[str, Any]
ROOT = Path(__file__).parents[2]


def imported(source: Path, kind: str | None = None, **how: Any) -> tuple[Summary, list[Tree]]:
    """Import next to the source; returns the summary and the rows."""
    out = source.parent / "imported.parquet"
    summary = import_source(source_at(str(source), kind, **how), target_at(str(out)))
    return summary, pq.read_table(out).to_pylist()


def rejects(source: Path) -> list[Tree]:
    return pq.read_table(source.parent / "imported-rejects.parquet").to_pylist()


def coco(folder: Path, **changed: Any) -> Tree:
    """A COCO folder of two images; ``changed`` replaces fields of the first annotation."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for name in ("1.png", "2.png"):
        (folder / "images" / name).write_bytes(png(20, 10))
    tree: Tree = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 20, "height": 10}
            for number in (1, 2)
        ],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 7, "bbox": [1, 1, 5, 5]}
            for number in (1, 2)
        ],
        "categories": [{"id": 7, "name": "cat"}],
    }
    tree["annotations"][0] |= changed
    return tree


def save(folder: Path, tree: object) -> Path:
    (folder / "annotations" / "instances.json").write_text(json.dumps(tree))
    return folder


WRONG_ANNOTATIONS = [
    ({"bbox": [1, 1, -5, 5]}, "bad-objects", "bbox"),
    ({"bbox": [1, 1, 0, 5]}, "bad-objects", "bbox"),
    ({"bbox": [15, 1, 50, 5]}, "bad-objects", "20 x 10"),
    ({"bbox": [1, 1, 5]}, "bad-objects", "3 numbers"),
    ({"bbox": [1, 1, 5, float("nan")]}, "bad-objects", "nan"),
    ({"bbox": [1, 1, 5, float("inf")]}, "bad-objects", "inf"),
    ({"bbox": [1, 1, "5", 5]}, "bad-objects", "'5'"),
    ({"bbox": None}, "bad-objects", "bbox"),
    ({"bbox": {"x": 1}}, "bad-objects", "bbox"),
    ({"category_id": 8}, "unknown-category", "8"),
    ({"category_id": "7"}, "unknown-category", "'7'"),
    ({"category_id": None}, "unknown-category", "nothing"),
    ({"category_id": True}, "unknown-category", "True"),
    ({"segmentation": [[1, 1, 2, 2]]}, "bad-objects", "polygon of 4"),
    ({"segmentation": [[1, 1, 2, 2, 3]]}, "bad-objects", "polygon of 5"),
    ({"segmentation": [[1, 1, 2, 2, float("nan"), 3]]}, "bad-objects", "nan"),
    ({"segmentation": {"size": [10, 10], "counts": [100]}}, "bad-objects", "size"),
    ({"segmentation": {"size": [10, 20], "counts": [100]}}, "bad-objects", "100"),
    ({"segmentation": {"size": [10, 20], "counts": "~~"}}, "bad-objects", "rle"),
    ({"segmentation": {"size": [10, 20], "counts": None}}, "bad-objects", "rle"),
    ({"segmentation": {"counts": [200]}}, "bad-objects", "size"),
    ({"keypoints": [1, 2]}, "bad-objects", "keypoints"),
    ({"keypoints": "abc"}, "bad-objects", "keypoints"),
    ({"iscrowd": 5}, "bad-objects", "iscrowd"),
    ({"area": "large"}, "bad-objects", "area"),
    ({"id": "x"}, "bad-objects", "id"),
    ({"id": 2}, "bad-objects", "id 2"),
]


@pytest.mark.parametrize(("changed", "reason", "said"), WRONG_ANNOTATIONS)
def test_a_wrong_annotation_costs_its_image(
    changed: Tree, reason: str, said: str, tmp_path: Path
) -> None:
    tree = coco(tmp_path / "in", **changed)
    folder = save(tmp_path / "in", tree)
    if changed == {"id": 2}:  # nobody knows which of the two is meant
        with pytest.raises(InputError, match="2 were rejected"):
            imported(folder)
        return
    summary, rows = imported(folder)
    assert [row["image_id"] for row in rows] == [2]
    assert summary.reasons == {reason: 1}
    (reject,) = rejects(folder)
    assert said in reject["message"], reject["message"]
    assert reject["source_file"] == "annotations/instances.json" and reject["place"] == "image 1"


def test_annotations_of_no_image_are_listed(tmp_path: Path) -> None:
    tree = coco(tmp_path / "in", image_id=99)
    summary, rows = imported(save(tmp_path / "in", tree))
    assert len(rows) == 2 and rows[0]["objects"]["bbox"] == []
    assert summary.reasons == {"unknown-image": 1}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 2}, "duplicate-key"),
        ({"file_name": "3.png"}, "missing-image"),
        ({"file_name": "../../1.png"}, "forbidden-image"),
        ({"file_name": "/etc/hostname"}, "forbidden-image"),
        ({"file_name": 5}, "bad-json"),
        ({"width": 21}, "bad-objects"),
        ({"width": -1}, "bad-objects"),
        ({"width": "20"}, "bad-objects"),
    ],
)
def test_a_wrong_image_costs_its_row(image: Tree, reason: str, tmp_path: Path) -> None:
    tree = coco(tmp_path / "in")
    tree["images"][0] |= image
    folder = save(tmp_path / "in", tree)
    if reason == "duplicate-key":  # the annotations of both are mixed up
        with pytest.raises(InputError, match="duplicate-key"):
            imported(folder)
        return
    summary, rows = imported(folder)
    assert [row["image_id"] for row in rows] == [2]
    assert summary.reasons[reason] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(images=None), "images"),
        (lambda tree: tree.update(annotations={}), "annotations"),
        (lambda tree: tree.update(categories=[{"id": 7}]), "name"),
        (lambda tree: tree.update(categories=[{"id": "7", "name": "cat"}]), "id"),
        (lambda tree: tree["categories"].append({"id": 7, "name": "dog"}), "'cat' and 'dog'"),
        (lambda tree: tree["categories"].append({"id": 8, "name": "cat"}), "two categories"),
        (lambda tree: tree["categories"][0].update(skeleton=[[1]]), "skeleton"),
        (lambda tree: tree.update(images=[]), "no images"),
    ],
)
def test_a_json_that_is_not_coco_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    tree = coco(tmp_path / "in")
    change(tree)
    with pytest.raises(InputError, match=said):
        imported(save(tmp_path / "in", tree))


def test_damaged_images_are_rejected_with_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = png(200, 200)
    contents = {
        "1-good.png": whole,
        "2-empty.png": b"",
        "3-text.png": b"hello",
        "4-short.png": whole[: len(whole) // 2],
        "5-page.jpg": b"<html></html>",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    summary, rows = imported(folder)
    assert [row["file_name"] for row in rows] == ["1-good.png"]
    assert summary.reasons == {"null-image": 1, "undecodable-image": 3}
    found = {row["source_file"]: row for row in rejects(folder)}
    assert found.keys() == contents.keys() - {"1-good.png"}
    assert all(name in row["message"] for name, row in found.items())
    assert found["2-empty.png"]["key"] == "2-empty"


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    header = bytearray(png(8, 8))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(bytes(header))
    (tmp_path / "in" / "b.png").write_bytes(png())
    summary, _ = imported(tmp_path / "in")
    assert summary.rejected == 1
    assert {"image-too-large", "undecodable-image"} & summary.reasons.keys()


YOLO_LINES = [
    ("1 0.5 0.5 0.2 0.2", "unknown-category", "class '1'"),
    ("-1 0.5 0.5 0.2 0.2", "unknown-category", "class '-1'"),
    ("cat 0.5 0.5 0.2 0.2", "unknown-category", "class 'cat'"),
    ("0 0.5 0.5 0.2", "bad-line", "4 values"),
    ("0 0.5 0.5 0.2 0.2 0.9", "bad-line", "6 values"),
    ("0 0.5 0.5 x 0.2", "bad-line", "'x'"),
    ("0 0.5 0.5 nan 0.2", "bad-line", "'nan'"),
    ("0 0.5 0.5 inf 0.2", "bad-line", "'inf'"),
    ("0 5 5 2 2", "bad-objects", "bbox"),
    ("0 0.5 0.5 0 0.2", "bad-objects", "bbox"),
    ("0 0.5 0.5 -0.2 0.2", "bad-objects", "bbox"),
]


@pytest.mark.parametrize(("line", "reason", "said"), YOLO_LINES)
def test_a_wrong_line_of_yolo_costs_its_image(
    line: str, reason: str, said: str, tmp_path: Path
) -> None:
    folder = yolo(tmp_path / "in")
    (folder / "labels" / "1.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    summary, rows = imported(folder)
    assert [row["file_name"] for row in rows] == ["images/2.png"]
    assert summary.reasons == {reason: 1}
    (reject,) = rejects(folder)
    place = "labels/1.txt, object 1" if reason == "bad-objects" else "labels/1.txt line 2"
    assert said in reject["message"] and place in reject["message"], reject["message"]


def yolo(folder: Path, more: str = "") -> Path:
    for inner in ("images", "labels"):
        (folder / inner).mkdir(parents=True)
    for name in ("1", "2"):
        (folder / "images" / f"{name}.png").write_bytes(png(20, 10))
    (folder / "data.yaml").write_text(more or "train: images\nnames: [cat]\n")
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: 5", "names"),
        ("names: []", "names"),
        ("names: [cat, cat]", "cat"),
        ("names: {1: cat}", "0, 1, 2"),
        ("names: [cat]\nkpt_shape: 3", "kpt_shape"),
        ("names: [cat]\nkpt_shape: [17, 9]", "kpt_shape"),
        ("names: [cat]\nnames: [dog]", "twice"),
        ("names: !!python/object/apply:os.system [ls]", "data.yaml"),
    ],
)
def test_a_wrong_data_yaml_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        imported(yolo(tmp_path / "in", text), "yolo")


def test_yolo_lists_labels_without_image_and_lists_without_file(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "in", "train: train.txt\nnames: [cat]\n")
    (folder / "train.txt").write_text("./images/1.png\nimages/9.png\n")
    (folder / "labels" / "7.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    summary, rows = imported(folder)
    assert len(rows) == 1 and rows[0]["objects"]["bbox"] == []
    assert summary.reasons == {"missing-image": 2}
    assert {row["source_file"] for row in rejects(folder)} == {"train.txt", "labels/7.txt"}
    assert any("1 images" in note for note in summary.notes)


XML = "<annotation><size><width>20</width><height>10</height></size>{}</annotation>"
OBJECT = (
    "<object><name>{name}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>"
    "<ymax>{3}</ymax></bndbox></object>"
)


def voc(folder: Path, text: str) -> Path:
    for inner in ("Annotations", "JPEGImages"):
        (folder / inner).mkdir(parents=True)
    for name, content in (("1", text), ("2", XML.format(""))):
        (folder / "JPEGImages" / f"{name}.png").write_bytes(png(20, 10))
        (folder / "Annotations" / f"{name}.xml").write_text(content)
    return folder


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<annotation>&b;</annotation>"
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "bad-xml"),
        (OUTSIDE, "bad-xml"),
        ("<annotation>", "bad-xml"),
        ("", "bad-xml"),
        ("<a>" * 50 + "</a>" * 50, "bad-xml"),
        (XML.format(OBJECT.format(1, 1, 5, "x", name="cat")), "bad-objects"),
        (XML.format(OBJECT.format(5, 5, 1, 1, name="cat")), "bad-objects"),
        (XML.format(OBJECT.format(1, 1, 500, 5, name="cat")), "bad-objects"),
        (XML.format(OBJECT.format(1, 1, "nan", 5, name="cat")), "bad-objects"),
        (XML.format(OBJECT.format(1, 1, 5, 5, name="")), "unknown-category"),
        (XML.format("<object><name>cat</name></object>"), "bad-objects"),
        (XML.format("").replace("20", "30"), "bad-objects"),
    ],
)
def test_a_wrong_xml_costs_its_image(text: str, reason: str, tmp_path: Path) -> None:
    folder = voc(tmp_path / "in", text)
    summary, rows = imported(folder)
    assert [row["file_name"] for row in rows] == ["JPEGImages/2.png"]
    assert summary.reasons == {reason: 1}
    assert "Annotations/1.xml" in str(summary.examples)


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    text = XML.format(
        OBJECT.format(1, 1, 20, 10, name="cat") + OBJECT.format(2, 3, 2, 3, name="cat")
    )
    _, rows = imported(voc(tmp_path / "in", text))
    boxes = {row["file_name"]: row["objects"]["bbox"] for row in rows}
    assert boxes["JPEGImages/1.png"] == [[0, 0, 20, 10], [1, 2, 1, 1]]
    assert boxes["JPEGImages/2.png"] == []


def test_a_mask_of_another_size_costs_its_image(tmp_path: Path) -> None:
    folder = voc(tmp_path / "in", XML.format(""))
    (folder / "SegmentationClass").mkdir()
    (folder / "SegmentationClass" / "1.png").write_bytes(png(10, 10))
    summary, rows = imported(folder)
    assert summary.reasons == {"bad-label_mask": 1} and rows[0]["label_mask"] is None


def test_a_mask_that_a_row_names_has_the_size_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, size in (("a", (20, 10)), ("m", (20, 10)), ("wrong", (10, 20))):
        (tmp_path / "in" / f"{name}.png").write_bytes(png(*size))
    (tmp_path / "in" / "p.csv").write_text("label_mask,image\nm.png,a.png\nwrong.png,a.png\n")
    summary = import_source(
        source_at(str(tmp_path / "in" / "p.csv")), target_at(str(tmp_path / "out.parquet"))
    )
    assert (summary.rows, summary.reasons) == (1, {"bad-label_mask": 1})
    assert "p.csv line 3" in summary.examples["bad-label_mask"]


LONG_NAME = "x" * 201


def test_hostile_names_of_classes(tmp_path: Path) -> None:
    """They are kept as they are, never used as file names, and shown with escapes."""
    names = ["../../etc", "a\x1b[2Jb", "{{ 7 * 7 }}", "{label}", "-rf", "CON", "ü" * 300]
    (tmp_path / "c.txt").write_text("\n".join(names))
    _, rows = imported(tmp_path / "c.txt", "classes")
    assert [row["class_name"] for row in rows] == names
    assert rows[3]["prompt"] == "a photo of a {label}"
    assert all("/" not in row["key"] and len(row["key"]) <= 130 for row in rows)
    assert len({row["key"] for row in rows}) == len(names)


def test_names_of_categories_are_bounded(tmp_path: Path) -> None:
    text = XML.format(OBJECT.format(1, 1, 5, 5, name=LONG_NAME))
    summary, _ = imported(voc(tmp_path / "in", text))
    assert summary.reasons == {"unknown-category": 1}


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_hostile_samples_of_a_tar(tmp_path: Path) -> None:
    good = png()
    tar(
        tmp_path / "in" / "a.tar",
        [
            ("good.png", good),
            ("good.json", b'{"prompt": "a"}'),
            ("bad.png", b"x"),
            ("json.png", good),
            ("json.json", b"{"),
            ("two.png", good),
            ("two.jpg", good),
            ("text.png", good),
            ("text.txt", b"\xff\xfe"),
            ("none.xyz", b"x"),
            ("../../up.png", good),
            ("good.png", good),
        ],
    )
    summary, rows = imported(tmp_path / "in")
    assert summary.reasons == {
        "undecodable-image": 1,
        "bad-json": 1,
        "no-image": 2,
        "not-utf8": 1,
        "duplicate-key": 1,
    }
    assert len(rows) == 2 and rows[0]["key"] == "good" and rows[0]["prompt"] == "a"
    assert "/" not in rows[1]["key"] and not (tmp_path / "up.png").exists()


def test_a_tar_that_ends_early_gives_the_rows_before(tmp_path: Path) -> None:
    path = tar(tmp_path / "in" / "a.tar", [(f"{n}.png", png(64, 64)) for n in range(20)])
    data = path.read_bytes()
    assert len(png(64, 64)) < 512  # so each member has two blocks of 512 bytes
    path.write_bytes(data[: 10 * 1024 + 512 + 100])
    summary, rows = imported(tmp_path / "in")
    assert [row["key"] for row in rows] == [str(number) for number in range(10)]
    assert summary.reasons == {"damaged-file": 1}
    assert "a.tar: damaged after" in summary.examples["damaged-file"]


def test_a_parquet_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(InputError, match=r"a\.parquet is not a complete file"):
        imported(tmp_path / "in")


def test_a_source_without_a_kind_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.xyz").write_text("x")
    with pytest.raises(InputError, match=r"a\.xyz.*--kind"):
        imported(tmp_path / "in")


def test_no_row_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(InputError, match="it has no rows"):
        imported(tmp_path / "a.txt")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt"]


def test_the_page_lists_every_reason() -> None:
    assert reasons.table() in (ROOT / "docs" / "import.md").read_text()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@fuzz(quick=60)
@given(
    field=st.sampled_from(["bbox", "category_id", "segmentation", "keypoints", "id", "area", "x"]),
    value=VALUES,
)
def test_any_value_in_an_annotation_is_a_row_or_a_reject(
    field: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "in"
    tree = coco(folder, **{field: value})
    try:
        summary, rows = imported(save(folder, tree))
    except BatchgenError:
        return
    assert summary.rows == len(rows) and summary.rows + summary.rejected == 2


@fuzz(quick=60)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_xml_or_refused(data: bytes) -> None:
    try:
        read_xml(data, "a.xml")
    except Refused as error:
        assert error.reason == "bad-xml" and "a.xml" in str(error)


@fuzz(quick=40)
@given(
    name=st.sampled_from(["a.csv", "a.jsonl", "a.txt", "a.tar", "a.png", "a.json"]),
    data=st.binary(),
)
def test_any_bytes_in_a_file_end_in_rows_or_an_error(
    name: str, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "in"
    folder.mkdir()
    (folder / name).write_bytes(data)
    try:
        summary, rows = imported(folder)
    except BatchgenError:
        return
    assert summary.rows == len(rows) > 0


def test_names_that_are_no_keys_are_safe_as_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("ü ;rm -rf.png", "CON.png", "a\nb.png", "-x.png"):
        (tmp_path / "in" / name).write_bytes(png())
    _, rows = imported(tmp_path / "in")
    assert all(row["key"].replace("-", "").replace("_", "").isalnum() for row in rows)
    assert len({row["key"] for row in rows}) == 4


def test_a_listing_leaves_out_what_systems_leave(tmp_path: Path) -> None:
    for name in (".DS_Store", "__MACOSX/1.png", "_batchgen/x.png", "1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    assert list(listed(str(tmp_path)).files) == ["1.png"]


def test_drawings_are_the_same_in_every_process() -> None:
    assert import_sources.drawings() == import_sources.drawings()
