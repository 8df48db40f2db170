"""Finished outputs are exported as COCO, YOLO, Pascal VOC and label masks."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from batchgen.cli import main
from batchgen.errors import InputError, Interrupted, OutputBusy, SpecError
from batchgen.labels.columns import objects_value
from batchgen.labels.objects import LabelObject, read_objects
from batchgen.labels.rle import Rle, decoded, drawn, encoded
from batchgen.output.datasets import write
from batchgen.output.datasets.choose import LAYOUTS, export_to
from batchgen.output.datasets.classes import Classes, classes_found
from batchgen.output.datasets.coco import MOST_OBJECTS, Coco, area_of
from batchgen.output.datasets.sample import LabelledImage, split_folder
from batchgen.output.datasets.voc import Voc
from batchgen.output.datasets.yolo import CROWDS, Yolo, joined
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.plan.keys import is_safe
from batchgen.spec.labels_section import Category
from batchgen.storage import Store, open_store
from tests.datasets_on_disk import png, write_columns
from tests.labelled_outputs import (
    CATEGORIES,
    EMPTY_ROW,
    HEIGHT,
    MASK,
    OBJECTS,
    ROWS,
    SPLITS,
    VOID_ROW,
    WIDTH,
    labelled_output,
    objects_of,
    write_source,
)

Tree = dict[str, Any]


def image_bytes_of(size: tuple[int, int], mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of 12 samples: with all labels, with objects only, with masks only, without."""
    folder = tmp_path_factory.mktemp("datasets")
    source = write_source(folder / "a.parquet")
    for name, parts in {
        "out": ("objects", "label_mask"),
        "boxes": ("objects",),
        "masks": ("label_mask",),
        "none": (),
    }.items():
        labelled_output(source, folder / name, *parts)
    return folder


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "target"))


def files_of(store: Store, but: str = "_batchgen") -> dict[str, bytes]:
    return {name: store.read(name) for name in store.find("") if not name.startswith(but)}


def split_of(row: int) -> str:
    return split_folder(SPLITS[row % 4], [])


def key_of(row: int) -> str:
    return f"a-{row:08d}-v0"


KEPT = [row for row in range(ROWS) if row != VOID_ROW]


# What is written


def test_coco_has_images_categories_and_annotations(whole: Path, target: Store) -> None:
    totals = export_to(at(whole / "out"), target, "coco")
    assert totals.left_out == {"labels are void": 1}
    trees = coco_of(target)
    assert trees.keys() == {split_of(row) for row in KEPT}
    rows = {image["id"] - 1: image for tree in trees.values() for image in tree["images"]}
    assert sorted(rows) == KEPT
    for row, image in rows.items():
        assert (image["file_name"], image["width"], image["height"]) == (
            f"{key_of(row)}.png",
            WIDTH,
            HEIGHT,
        )
        told = image["batchgen"]
        assert (told["key"], told["labels_are"]) == (key_of(row), "kept")
        assert told["source"] == {"file_name": f"photo {row}.jpg"} and told["label"] == row % 3
        assert target.read(f"images/{split_of(row)}/{image['file_name']}")
    wanted = [{name: one[name] for name in one if name != "colour"} for one in CATEGORIES]
    for tree in trees.values():
        assert tree["categories"] == wanted
        assert {one["image_id"] for one in tree["annotations"]} <= {
            image["id"] for image in tree["images"]
        }
    found = {one["id"]: one for tree in trees.values() for one in tree["annotations"]}
    assert len(found) == 3 * (len(KEPT) - 1)
    person, car, crowd = (found[2 * MOST_OBJECTS + place] for place in (1, 2, 3))
    assert [one["category_id"] for one in (person, car, crowd)] == [7, 3, 12]
    assert person["bbox"] == [1.0, 2.0, 4.5, 3.25]
    assert (person["keypoints"], person["num_keypoints"]) == ([1.5, 2.5, 2, 3.0, 4.0, 1], 2)
    assert (person["source_id"], person["score"]) == (100, 0.5)
    assert len(car["segmentation"]) == 2 and "keypoints" not in car
    assert crowd["iscrowd"] == 1 and crowd["segmentation"]["size"] == [HEIGHT, WIDTH]
    assert "score" not in crowd


def test_a_store_that_is_no_disk_gets_the_same_files(whole: Path, target: Store) -> None:
    remote = open_store(f"memory://{uuid.uuid4().hex}")
    for store in (target, remote):
        export_to(at(whole / "out"), store, "coco")
    assert files_of(remote) == files_of(target)
    assert remote.find("_batchgen").keys() == target.find("_batchgen").keys()


def coco_of(target: Store) -> dict[str, Tree]:
    return {
        name.removeprefix("instances_").removesuffix(".json"): json.loads(
            target.read(f"annotations/{name}")
        )
        for name in target.list("annotations")
    }


def test_the_license_is_told(whole: Path, tmp_path: Path, target: Store) -> None:
    source = whole / "a.parquet"
    ledger = labelled_output(source, tmp_path / "out", "objects", output__license="cc-by-4.0")
    export_to(ledger, target, "coco")
    for tree in coco_of(target).values():
        assert tree["licenses"] == [{"id": 1, "name": "cc-by-4.0", "url": ""}]
        assert {image["license"] for image in tree["images"]} == {1}


def test_yolo_has_a_label_file_for_every_image(whole: Path, target: Store) -> None:
    totals = export_to(at(whole / "out"), target, "yolo")
    assert totals.notes == {CROWDS: len(KEPT) - 1}
    for row in KEPT:
        text = target.read(f"labels/{split_of(row)}/{key_of(row)}.txt").decode()
        if row == EMPTY_ROW:
            assert text == ""
        else:
            box = [float(word) for word in text.splitlines()[0].split()]
            assert box == pytest.approx([0, 3.25 / 16, 3.625 / 8, 4.5 / 16, 3.25 / 8])
            assert len(text.splitlines()) == 2
    tree = yaml.safe_load(target.read("data.yaml"))
    assert tree["train"] == "images/train" and tree["val"] == "images/validation"
    assert tree["names"] == {place: one["name"] for place, one in enumerate(CATEGORIES)}


def test_yolo_segments_are_polygons_where_every_object_has_one(whole: Path, target: Store) -> None:
    totals = export_to(at(whole / "out"), target, "yolo", segments=True)
    assert totals.notes == {CROWDS: len(KEPT) - 1}
    lines = target.read(f"labels/train/{key_of(0)}.txt").decode().splitlines()
    shapes = [np.array(line.split()[1:], float).reshape(-1, 2) * (WIDTH, HEIGHT) for line in lines]
    assert shapes[0].tolist() == [[1.0, 2.0], [5.5, 2.0], [5.5, 5.25], [1.0, 5.25]]
    assert polygon_area(shapes[1]) == pytest.approx(9.0 + 12.0)  # two parts, joined


def polygon_area(points: np.ndarray[Any, Any]) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def test_yolo_without_a_validation_split_says_so(whole: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "b.parquet", rows=1)
    export_to(
        labelled_output(source, tmp_path / "out", "objects"), at(tmp_path / "t").store, "yolo"
    )
    text = (tmp_path / "t/data.yaml").read_text()
    assert yaml.safe_load(text)["val"] == "images/train" and "no validation split" in text


def test_voc_has_corners_and_flags(whole: Path, target: Store) -> None:
    export_to(at(whole / "out"), target, "voc")
    root = ElementTree.fromstring(target.read(f"Annotations/{key_of(1)}.xml"))
    assert root.findtext("filename") == f"{key_of(1)}.png"
    assert [root.findtext(f"size/{side}") for side in ("width", "height", "depth")] == [
        *(str(WIDTH), str(HEIGHT), "3")
    ]
    found = root.findall("object")
    assert [one.findtext("name") for one in found] == ["person", "car: red", "tree"]
    assert [one.findtext("difficult") for one in found] == ["0", "0", "1"]
    assert voc_box(found[1]) == (7, 1, 16, 8)
    listed = {name: target.read(f"ImageSets/Main/{name}") for name in target.list("ImageSets/Main")}
    keys = {name.removesuffix(".txt"): data.decode().split() for name, data in listed.items()}
    assert keys == {
        split: [key_of(row) for row in KEPT if split_of(row) == split]
        for split in {split_of(row) for row in KEPT}
    }
    assert target.read("labelmap.txt").decode().splitlines()[1:] == [
        *("person:::", "car_ red:::", "tree:0,160,20::")
    ]


def voc_box(found: ElementTree.Element) -> tuple[int, ...]:
    names = ("xmin", "ymin", "xmax", "ymax")
    return tuple(int(found.findtext(f"bndbox/{name}") or "") for name in names)


def test_masks_keep_their_bytes(whole: Path, target: Store) -> None:
    export_to(at(whole / "out"), target, "mask-png")
    table = shard_table(whole / "out", 0)
    for row in range(3):
        wanted = table.column("label_mask")[row].as_py()["bytes"]
        assert target.read(f"masks/{split_of(row)}/{key_of(row)}.png") == wanted
    told = json.loads(target.read("classes.json"))
    assert told == {str(number): f"class {number}" for number in range(3)}


def test_masks_have_the_names_of_the_categories_if_no_objects_have_them(
    whole: Path, tmp_path: Path, target: Store
) -> None:
    names = ["road", "sky", "tree"]
    settings = {"labels__categories": names}
    out = labelled_output(whole / "a.parquet", tmp_path / "out", "label_mask", **settings)
    export_to(out, target, "mask-png")
    assert json.loads(target.read("classes.json")) == {"0": "road", "1": "sky", "2": "tree"}


def shard_table(out: Path, shard: int) -> pa.Table:
    return pq.read_table(sorted((out / "data").iterdir())[shard])


def test_masks_are_drawn_from_objects(whole: Path, target: Store) -> None:
    export_to(at(whole / "boxes"), target, "mask-png")
    with Image.open(io.BytesIO(target.read(f"masks/train/{key_of(0)}.png"))) as image:
        pixels = np.asarray(image)
    objects = objects_of(0)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    for place in (0, 1):
        wanted[drawn(objects["segmentation"][place], (WIDTH, HEIGHT))] = place + 1
    wanted[1:3, 9:13] = 3  # the crowd is drawn last
    assert (pixels == wanted).all()
    told = json.loads(target.read("classes.json"))
    assert told == {"0": "background", "1": "person", "2": "car: red", "3": "tree"}


@pytest.mark.parametrize("to", LAYOUTS)
def test_images_keep_their_bytes(to: str, whole: Path, target: Store) -> None:
    export_to(at(whole / "out"), target, to)
    found = {name.rpartition("/")[2]: data for name, data in files_of(target).items()}
    for shard in range(3):
        table = shard_table(whole / "out", shard)
        for image in table.column("image").to_pylist():
            key = image["path"].removesuffix(".png")
            folder = "JPEGImages" if to == "voc" else "images"
            same = [n for n in files_of(target) if n.startswith(folder) and key in n]
            assert bool(same) == (key != key_of(VOID_ROW))
            assert all(target.read(name) == image["bytes"] for name in same)
    assert found


@pytest.mark.parametrize("form", ["webdataset", "image-folder"])
def test_every_format_gives_the_same_dataset(
    form: str, whole: Path, tmp_path: Path, target: Store
) -> None:
    out = labelled_output(whole / "a.parquet", tmp_path / "o", "objects", output__format=form)
    export_to(out, target, "coco")
    other = open_store(str(tmp_path / "other"))
    export_to(at(whole / "boxes"), other, "coco")
    one, two = coco_of(target), coco_of(other)
    for tree in (*one.values(), *two.values()):
        del tree["info"]  # another plan
    assert one == two


# Splits, categories and void labels


@given(st.text(max_size=40) | st.none())
def test_a_split_is_a_safe_folder(split: str | None) -> None:
    folder = split_folder(split, [])
    assert is_safe(folder)
    assert split_folder(split, []) == folder


@pytest.mark.parametrize(
    ("split", "folder"),
    [(None, "train"), ("", "train"), ("test", "test"), (1, "val"), ("../x", None), ("a/b", None)],
)
def test_splits(split: Any, folder: str | None) -> None:
    found = split_folder(split, ["train", "val"])
    assert found == folder if folder else "/" not in found and "." not in found


def test_splits_that_differ_in_capitals_stay_apart() -> None:
    assert len({split_folder(one, []).lower() for one in ("Train", "train", "TRAIN")}) == 3


@pytest.mark.parametrize(("to", "labels"), [("coco", 0), ("yolo", 0), ("voc", 0)])
def test_void_labels_can_be_empty(to: str, labels: int, whole: Path, target: Store) -> None:
    totals = export_to(at(whole / "out"), target, to, void="empty")
    assert sum(images for images, _ in totals.splits.values()) == ROWS
    key = key_of(VOID_ROW)
    if to == "yolo":
        assert target.read(f"labels/{split_of(VOID_ROW)}/{key}.txt") == b""
    elif to == "voc":
        assert b"<object>" not in target.read(f"Annotations/{key}.xml")
    else:
        tree = coco_of(target)[split_of(VOID_ROW)]
        assert [one["id"] for one in tree["images"] if one["batchgen"]["labels_are"] == "void"]
        assert VOID_ROW + 1 not in {one["image_id"] for one in tree["annotations"]}


@pytest.mark.parametrize("out", ["out", "boxes"])
def test_void_masks_can_be_ignored(out: str, whole: Path, target: Store) -> None:
    export_to(at(whole / out), target, "mask-png", void="empty")
    name = f"masks/{split_of(VOID_ROW)}/{key_of(VOID_ROW)}.png"
    with Image.open(io.BytesIO(target.read(name))) as image:
        assert (np.asarray(image) == 255).all()
    assert json.loads(target.read("classes.json"))["255"] == "ignored"


def test_void_labels_can_be_refused_before_anything_is_written(whole: Path, target: Store) -> None:
    with pytest.raises(InputError, match=f"{key_of(VOID_ROW)} are void"):
        export_to(at(whole / "out"), target, "coco", void="refuse")
    assert [name for name in target.find("") if "/lease/" not in name] == []
    export_to(at(whole / "out"), target, "coco")  # the target is still as good as empty


def test_an_output_whose_labels_are_all_void_is_refused(
    whole: Path, tmp_path: Path, target: Store
) -> None:
    out = labelled_output(whole / "a.parquet", tmp_path / "v", "objects", labels__are="void")
    with pytest.raises(
        InputError, match=r"no image can be exported \(12 images left out: labels are void"
    ):
        export_to(out, target, "coco")
    assert export_to(out, target, "coco", void="empty").splits["train"] == [6, 0]


def test_categories_that_nobody_names_are_those_of_the_data(tmp_path: Path, target: Store) -> None:
    objects = [
        {"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": ["dog" if row else "ant"]} for row in (0, 1)
    ]
    for kind, names in ((pa.string(), ["ant", "dog"]), (pa.int64(), ["4", "17"])):
        given = objects
        if kind == pa.int64():
            given = [{**one, "category": [17 if row else 4]} for row, one in enumerate(objects)]
        folder = tmp_path / str(kind)
        fields = [("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(kind))]
        columns = {
            "image": pa.array([{"bytes": png(WIDTH, HEIGHT), "path": None}] * 2, MASK),
            "prompt": ["a", "b"],
            "objects": pa.array(given, pa.struct(fields)),
            "strength": [0.3, 0.3],
            "label": [1, 2],
        }
        source = write_columns(folder / "a.parquet", columns)
        out = labelled_output(source, folder / "out", "objects")
        target = open_store(str(folder / "coco"))
        export_to(out, target, "coco")
        tree = coco_of(target)["train"]
        assert [one["name"] for one in tree["categories"]] == names
        ids = [0, 1] if kind == pa.string() else [4, 17]
        assert [one["category_id"] for one in tree["annotations"]] == ids
        yolo = open_store(str(folder / "yolo"))
        export_to(out, yolo, "yolo")
        assert yaml.safe_load(yolo.read("data.yaml"))["names"] == dict(enumerate(names))
        lines = [data[:1] for name, data in sorted(files_of(yolo).items()) if ".txt" in name]
        assert lines == [b"0", b"1"]


def test_categories_with_one_id_are_refused() -> None:
    classes = Classes((Category(name="a", id=1), Category(name="b")))
    with pytest.raises(InputError, match="'a' and 'b' have the id 1"):
        _ = classes.ids
    assert classes_found(["b", "a", "b"]).categories[1].name == "b"


# Refusals


@pytest.mark.parametrize(
    ("out", "to", "said"),
    [
        ("none", "coco", "has no labels for --to coco; missing: the column objects"),
        ("none", "mask-png", "missing: the column label_mask, or objects with segmentation"),
        ("masks", "yolo", "missing: the column objects; its label masks go out with --to mask-png"),
    ],
)
def test_an_output_without_the_labels_is_refused(
    out: str, to: str, said: str, whole: Path, target: Store
) -> None:
    with pytest.raises(InputError, match=said):
        export_to(at(whole / out), target, to)
    assert target.find("") == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"name": "zip"}, "--to: got 'zip'; allowed: coco, yolo, voc, mask-png"),
        ({"name": "coco", "void": "drop"}, "--void: got 'drop'; allowed: skip, empty, refuse"),
        ({"name": "coco", "segments": True}, "--segments is set to 'coco', but coco has no use"),
    ],
)
def test_unknown_words_are_refused(words: Tree, said: str, whole: Path, target: Store) -> None:
    with pytest.raises(SpecError, match=said):
        export_to(at(whole / "out"), target, **words)


def test_the_source_and_the_target_are_checked_as_for_a_format(
    whole: Path, tmp_path: Path, target: Store
) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    with pytest.raises(InputError, match="must not be inside the source output"):
        export_to(at(out), open_store(str(out / "coco")), "coco")
    target.put("mine.txt", b"x")
    with pytest.raises(InputError, match=r"is not empty \(mine.txt\)"):
        export_to(at(out), target, "coco")
    target.delete("mine.txt")
    path = sorted((out / "data").iterdir())[1]
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:-1])
    with pytest.raises(InputError, match="content does not match the checksum"):
        export_to(at(out), target, "coco")
    path.write_bytes(whole_file)
    acquire_lease(target)
    with pytest.raises(OutputBusy):
        export_to(at(out), target, "coco")
    (out / "_batchgen/shards/00001.json").unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards are pending or failed \(1\)"):
        export_to(at(out), target, "coco")


# Interruptions


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("stop_at", [0, 3, 9, 15, 40])
def test_an_interrupted_export_continues(
    to: str,
    stop_at: int,
    whole: Path,
    tmp_path: Path,
    target: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The write number ``stop_at`` does not happen; no file of annotations exists before all."""
    monkeypatch.setattr(write, "_THREADS", 1)
    left = [stop_at]
    put = Store.put

    def put_some(self: Store, name: str, data: bytes) -> None:
        if "/lease/" not in name:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted("stopped")
        put(self, name, data)

    monkeypatch.setattr(Store, "put", put_some)
    try:
        export_to(at(whole / "out"), target, to)
    except Interrupted:
        found = files_of(target)
        complete = [n for n in found if n.startswith(LAST)]
        if complete:  # then everything before it is there
            assert sum(name.endswith(".png") for name in found) >= len(KEPT)
    monkeypatch.undo()
    export_to(at(whole / "out"), target, to)
    fresh = open_store(str(tmp_path / "fresh"))
    export_to(at(whole / "out"), fresh, to)
    assert files_of(target) == files_of(fresh)
    assert target.find("_batchgen/export") == {}


LAST = ("annotations/", "data.yaml", "ImageSets/", "classes.json")


def test_a_complete_export_is_not_written_again(whole: Path, target: Store) -> None:
    first = export_to(at(whole / "out"), target, "coco")
    again = export_to(at(whole / "out"), target, "coco")
    assert (first.written_now, again.written_now) == (3, 0)
    assert again.text() == first.text()
    with pytest.raises(InputError, match="is not empty"):
        export_to(at(whole / "out"), target, "yolo")
    with pytest.raises(InputError, match="is not empty"):
        export_to(at(whole / "out"), target, "coco", void="empty")


def test_a_source_that_changed_since_is_noticed(
    whole: Path, tmp_path: Path, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    last = Coco.last

    def stop(*args: Any) -> Iterator[Any]:
        raise Interrupted("stopped")

    monkeypatch.setattr(Coco, "last", stop)
    with pytest.raises(Interrupted):
        export_to(at(out), target, "coco")
    monkeypatch.setattr(Coco, "last", last)
    rewrite_shard(out, 1)
    assert export_to(at(out), target, "coco").written_now == 1
    rewrite_shard(out, 2)
    with pytest.raises(InputError, match="were generated again since"):
        export_to(at(out), target, "coco")


def rewrite_shard(out: Path, shard: int, change: Callable[[Tree], object] = len) -> None:
    """The shard with other bytes and changed rows, and a marker that agrees, as after a repair."""
    path = sorted((out / "data").iterdir())[shard]
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    data = path.read_bytes()
    marker = out / f"_batchgen/shards/{shard:05d}.json"
    tree = json.loads(marker.read_text())
    tree["files"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    marker.write_text(json.dumps(tree))


# Hostile outputs


def no_number(row: Tree) -> None:
    row["objects"]["bbox"][0][0] = float("nan")


def unknown_category(row: Tree) -> None:
    row["objects"]["category"][0] = 99


def other_size(row: Tree) -> None:
    row["objects"]["rle"][2]["size"] = [9, 9]


def broken_runs(row: Tree) -> None:
    row["objects"]["rle"][2]["counts"] = "`" * 50


def more_boxes(row: Tree) -> None:
    row["objects"]["bbox"].append([0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "change", [no_number, unknown_category, other_size, broken_runs, more_boxes]
)
@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_labels_that_no_run_writes_are_refused(
    to: str, change: Callable[[Tree], object], whole: Path, tmp_path: Path, target: Store
) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    rewrite_shard(out, 0, change)
    with pytest.raises(InputError, match="a-00000000-v0"):
        export_to(at(out), target, to)
    assert not [name for name in target.find("") if name.startswith(LAST)]


def escaping(row: Tree) -> None:
    row["image"]["path"] = "../../../escaped.png"


def other_key(row: Tree) -> None:
    row["key"] = "../../../escaped"


@pytest.mark.parametrize("change", [escaping, other_key])
@pytest.mark.parametrize("to", LAYOUTS)
def test_names_that_lead_elsewhere_write_nothing(
    to: str, change: Callable[[Tree], object], whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "a/b/c/out"))
    rewrite_shard(out, 0, change)
    with pytest.raises(InputError):
        export_to(at(out), open_store(str(tmp_path / "a/b/c/target")), to)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    "mask", [b"no image", image_bytes_of((8, 8)), image_bytes_of((16, 8), "RGB")]
)
def test_masks_that_no_run_writes_are_refused(
    mask: bytes, whole: Path, tmp_path: Path, target: Store
) -> None:
    out = Path(shutil.copytree(whole / "masks", tmp_path / "out"))
    rewrite_shard(out, 0, lambda row: row["label_mask"].update(bytes=mask))
    with pytest.raises(InputError, match="a-00000000-v0"):
        export_to(at(out), target, "mask-png")


# The command


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["export", *words])
    return result.exit_code, result.output


def test_the_command_says_how_many_and_why(whole: Path, target: Store) -> None:
    code, told = run(str(whole / "out"), target.url, "--to", "yolo")
    assert code == 0
    assert "3 shards written now; train: 6 images, 10 objects; validation: 2 images" in told
    assert "1 image left out: labels are void; 10 crowds left out: YOLO has none" in told
    code, told = run(str(whole / "out"), target.url, "--to", "yolo", "--json")
    assert json.loads(told)["splits"]["train"] == [6, 10]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of --format and --to is needed"),
        (["--to", "coco", "--format", "parquet"], "one of --format and --to is needed"),
        (["--format", "parquet", "--void", "skip"], "--void and --segments need --to"),
        (["--format", "parquet", "--segments"], "--void and --segments need --to"),
        (["--to", "zip"], "allowed: coco, yolo, voc, mask-png"),
    ],
)
def test_the_command_refuses_words_that_do_not_fit(
    words: list[str], said: str, whole: Path, target: Store
) -> None:
    code, told = run(str(whole / "out"), target.url, *words)
    assert code == 1 and said in told


# Properties


SIZE = (64, 48)
CLASSES = Classes((Category(name="a", id=5), Category(name="b", id=2)))
sides = st.tuples(
    st.floats(0, SIZE[0] - 1), st.floats(0, SIZE[1] - 1), st.floats(0.01, 64), st.floats(0.01, 48)
)
points = st.tuples(st.floats(0, SIZE[0]), st.floats(0, SIZE[1]))


@st.composite
def label_objects(draw: st.DrawFn) -> LabelObject:
    x, y, width, height = draw(sides)
    box = (x, y, min(width, SIZE[0] - x), min(height, SIZE[1] - y))
    shape = draw(st.sampled_from(["box", "polygons", "rle"]))
    polygons: tuple[tuple[float, ...], ...] = ()
    rle: Rle | None = None
    if shape == "polygons":
        shapes = draw(st.lists(st.lists(points, min_size=3, max_size=5), min_size=1, max_size=3))
        polygons = tuple(tuple(value for point in one for value in point) for one in shapes)
    elif shape == "rle":
        bits = draw(st.binary(min_size=8, max_size=8))
        coarse = np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(8, 8).astype(bool)
        rle = encoded(np.kron(coarse, np.ones((6, 8), dtype=bool)))
    seen = st.tuples(*points_and_visibility())
    return LabelObject(
        box=box,
        category=draw(st.sampled_from([0, 1])),
        polygons=polygons,
        rle=rle,
        keypoints=tuple(draw(st.lists(seen, max_size=3))),
        area=draw(st.none() | st.floats(0, 3072)),
        iscrowd=draw(st.sampled_from([0, 1])),
        others=draw(st.sampled_from([{}, {"score": 0.5}, {"score": 0.25, "tag": "x"}])),
    )


def points_and_visibility() -> tuple[Any, Any, Any]:
    return st.floats(0, SIZE[0]), st.floats(0, SIZE[1]), st.sampled_from([0, 1, 2])


def image_with(objects: list[LabelObject], number: int = 11) -> LabelledImage:
    facts = {"key": "k", "labels_are": "kept"}
    return LabelledImage(number, "train", "k.png", b"", SIZE, tuple(objects), None, facts)


@given(st.lists(label_objects(), max_size=4))
def test_coco_loses_nothing_that_it_can_say(objects: list[LabelObject]) -> None:
    made = Coco().image(image_with(objects), CLASSES)
    tree = json.loads(json.dumps(made.entry))
    ids = [one["id"] for one in tree["annotations"]]
    assert ids == [12 * MOST_OBJECTS + place for place in range(1, len(objects) + 1)]
    places = {5: 0, 2: 1}
    back = read_objects(
        [{**one, "category": places[one["category_id"]]} for one in tree["annotations"]],
        SIZE,
        "coco",
        ("a", "b"),
        "objects",
    )
    for was, one, annotation in zip(objects, back, tree["annotations"], strict=True):
        assert one.box == pytest.approx(was.box)
        assert (one.category, one.polygons, one.iscrowd) == (
            *(was.category, was.polygons, was.iscrowd),
        )
        assert one.keypoints == was.keypoints
        assert one.area == area_of(was)
        assert was.others.items() <= annotation.items()
        assert (one.rle is None) == (was.rle is None)
        if one.rle is not None and was.rle is not None:
            assert (decoded(one.rle) == decoded(was.rle)).all()
            assert coco_mask.area(annotation["segmentation"]) == decoded(was.rle).sum()


@given(st.lists(label_objects(), max_size=4))
def test_yolo_boxes_come_back_to_a_millionth(objects: list[LabelObject]) -> None:
    made = Yolo().image(image_with(objects), CLASSES)
    lines = dict(made.files)["labels/train/k.txt"].decode().splitlines()
    kept = [one for one in objects if not one.iscrowd]
    assert len(lines) == len(kept) == made.objects
    for line, one in zip(lines, kept, strict=True):
        place, *numbers = line.split()
        x, y, width, height = map(float, numbers)
        back = (x - width / 2, y - height / 2, width, height)
        shares = [value / SIZE[axis % 2] for axis, value in enumerate(one.box)]
        assert int(place) == one.category
        assert back == pytest.approx(shares, abs=1e-6)


@given(st.lists(label_objects(), min_size=1, max_size=3))
def test_yolo_polygons_have_the_area_of_their_parts(objects: list[LabelObject]) -> None:
    for one in objects:
        if one.polygons:
            whole = np.array(joined(one.polygons)).reshape(-1, 2)
            parts = [np.array(polygon).reshape(-1, 2) for polygon in one.polygons]
            wanted = {tuple(point) for part in parts for point in part.tolist()}
            assert {tuple(point) for point in whole.tolist()} == wanted
            signed = sum(signed_area(part) for part in parts)
            assert signed_area(whole) == pytest.approx(signed, abs=1e-6)


def signed_area(points: np.ndarray[Any, Any]) -> float:
    x, y = points.T
    return float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@given(st.lists(label_objects(), max_size=4))
def test_voc_corners_move_by_at_most_half_a_pixel(objects: list[LabelObject]) -> None:
    made = Voc().image(image_with(objects), CLASSES)
    root = ElementTree.fromstring(dict(made.files)["Annotations/k.xml"])
    found = root.findall("object")
    assert len(found) == len(objects)
    for xml, one in zip(found, objects, strict=True):
        left, top, right, bottom = voc_box(xml)
        assert xml.findtext("name") == "ab"[int(one.category)]
        x, y, width, height = one.box
        for first, last, start, length, side in (
            (left, right, x, width, SIZE[0]),
            (top, bottom, y, height, SIZE[1]),
        ):
            assert 1 <= first <= last <= side
            least = 0.5 if round(start) < round(start + length) else 1.0  # under a pixel wide
            assert abs(first - 1 - start) <= least and abs(last - start - length) <= least


def test_too_many_objects_for_ids_are_refused() -> None:
    one = LabelObject((0.0, 0.0, 1.0, 1.0), 0)
    with pytest.raises(InputError, match="has 100000 objects; allowed: fewer than 100000"):
        Coco().image(image_with([one] * MOST_OBJECTS), CLASSES)


def test_text_that_xml_cannot_hold_is_replaced() -> None:
    classes = Classes((Category(name="a\x01<b>&\ufffe"), Category(name="b")))
    one = LabelObject((0.0, 0.0, 1.0, 1.0), 0)
    made = Voc().image(image_with([one]), classes)
    root = ElementTree.fromstring(dict(made.files)["Annotations/k.xml"])
    assert root.findtext("object/name") == "a\ufffd<b>&\ufffd"


def test_objects_of_the_fixture_are_those_of_the_format() -> None:
    """The values of the tests are those that a run writes."""
    read = read_objects(objects_of(1), (WIDTH, HEIGHT), "coco", None, "objects")
    again = pa.array([objects_value(read, OBJECTS)], OBJECTS).to_pylist()[0]
    assert again["bbox"] == objects_of(1)["bbox"]
