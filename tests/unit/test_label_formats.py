"""Labels in tars and image folders: masks as files, objects without nulls, boxes on the sheet."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchgen.images.files import Mark, contact_sheet, marked, thumbnail
from batchgen.labels.columns import IMAGE
from batchgen.output.formats import FORMATS
from batchgen.output.formats.image_folder import ImageFolder
from batchgen.output.formats.json_objects import rest_column, with_nulls, without_nulls
from batchgen.output.formats.webdataset import WebDataset
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.report.gallery import colour_of, shown_of
from batchgen.storage import open_store
from tests.datasets_on_disk import png
from tests.labelled_outputs import (
    CATEGORIES,
    EMPTY_ROW,
    OBJECTS,
    VOID_ROW,
    labelled_output,
    mask_of,
    write_source,
)

ROWS = 12
JSON_FORMATS = [WebDataset(), ImageFolder()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    source = write_source(folder / "a.parquet")
    for name in FORMATS:
        ledger = labelled_output(
            source, folder / name, "objects", "label_mask", output__format=name
        )
        plan = ledger.require_plan()
        finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return folder


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


@pytest.mark.parametrize("name", FORMATS)
def test_verification_proves_outputs_with_labels(name: str, whole: Path) -> None:
    found = verify(at(whole / name))
    assert (found.problems, found.accepted) == ([], ROWS)


def test_a_tar_has_the_mask_as_a_file_and_the_objects_in_the_json(whole: Path) -> None:
    members: dict[str, bytes] = {}
    for path in sorted((whole / "webdataset/data").iterdir()):
        with tarfile.open(path) as archive:
            members |= {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    for row in range(ROWS):
        key = f"a-{row:08d}-v0"
        told = json.loads(members[f"{key}.json"])
        if row == VOID_ROW:
            assert told["label_mask"] is None and told["objects"] is None
            assert f"{key}.seg.png" not in members
            continue
        assert "label_mask" not in told
        assert decoded(members[f"{key}.seg.png"]) == decoded(mask_of(row))
        assert len(told["objects"]["bbox"]) == (0 if row == EMPTY_ROW else 3)


def decoded(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        return image.tobytes()


# Reading is the inverse of writing


def table_of(masks: list[Any], objects: list[Any]) -> pa.Table:
    keys = [f"k{number}" for number in range(len(masks))]
    return pa.table(
        {
            "key": keys,
            "image": pa.array([{"bytes": png(), "path": f"{key}.png"} for key in keys], IMAGE),
            "prompt": keys,
            "label": pa.array([None] * len(keys), pa.string()),
            "label_mask": pa.array(masks, IMAGE),
            "objects": pa.array(objects, OBJECTS),
        }
    )


PNG = mask_of(1)
masks = st.sampled_from(
    [
        None,
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "elsewhere.png"},
        {"bytes": None, "path": "elsewhere.png"},
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"no png", "path": None},
    ]
)
numbers = st.floats(0, 100)
boxes = st.lists(numbers, min_size=4, max_size=4)


@st.composite
def objects_values(draw: st.DrawFn) -> dict[str, Any] | None:
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    count = draw(st.integers(0, 3))
    rle = st.fixed_dictionaries({"size": st.just([8, 16]), "counts": st.text(max_size=3)})
    fields = {
        "id": st.none() | st.integers(0, 9),
        "bbox": boxes,
        "category": st.integers(0, 2),
        "area": st.none() | numbers,
        "iscrowd": st.none() | st.integers(0, 1),
        "segmentation": st.none() | st.lists(boxes, max_size=2),
        "rle": st.none() | rle,
        "keypoints": st.none() | boxes | st.just([]),
        "score": st.none() | numbers,
    }
    return {
        name: draw(st.none() | st.lists(kind, min_size=count, max_size=count))
        if name == "score"
        else draw(st.lists(kind, min_size=count, max_size=count))
        for name, kind in fields.items()
    }


@pytest.mark.parametrize("form", JSON_FORMATS, ids=lambda form: type(form).__name__)
@given(rows=st.lists(st.tuples(masks, objects_values()), max_size=4))
def test_reading_is_the_inverse_of_writing(
    form: WebDataset | ImageFolder, rows: list[tuple[Any, Any]]
) -> None:
    table = table_of([mask for mask, _ in rows], [value for _, value in rows])
    files = {file.name: file.data for file in form.files(table, 0, 1)}
    assert form.read(files).equals(table)
    some = form.read(files, ["key", "image", "label_mask"])
    assert some.equals(table.select(["key", "image", "label_mask"]))
    assert form.read(files, ["key"]).equals(table.select(["key"]))


@given(objects_values())
def test_objects_without_nulls_come_back(value: dict[str, Any] | None) -> None:
    types = {field.name: field.type.value_type for field in OBJECTS}
    shown, rest = without_nulls(value, types)
    assert with_nulls(shown, rest, types) == value
    for values in (shown or {}).values():
        assert values is not None and None not in values


@given(st.lists(objects_values(), min_size=1, max_size=4))
def test_pyarrow_reads_what_an_image_folder_says(values: list[dict[str, Any] | None]) -> None:
    """As Hugging Face's ImageFolder does; with nulls in lists it gives values to other objects."""
    table = table_of([None] * len(values), values)
    files = {file.name: file.data for file in ImageFolder().files(table, 0, 1)}
    (name,) = (name for name in files if name.endswith(".jsonl"))
    found = pyarrow.json.read_json(io.BytesIO(files[name]))
    found.validate(full=True)
    for row, value in zip(found.to_pylist(), values, strict=True):
        if value is not None:
            for field in ("bbox", "category"):
                assert row["objects"][field] == value[field]
            shapes = (row["objects"] or {}).get("segmentation")
            if shapes is not None:
                assert [one or None for one in shapes] == [
                    one or None for one in value["segmentation"]
                ]


def test_the_column_of_nulls_has_a_name_of_its_own() -> None:
    assert rest_column(["objects"]) == "objects_with_nulls"
    assert rest_column(["objects_with_nulls"]) == "objects_with_nulls_"


def test_a_mask_that_does_not_belong_to_its_row_is_refused() -> None:
    table = table_of([{"bytes": PNG, "path": None}, None], [None, None])
    files = {file.name: file.data for file in ImageFolder().files(table, 0, 1)}
    mask = next(name for name in files if name.endswith(".seg.apng"))
    less = {name: data for name, data in files.items() if name != mask}
    with pytest.raises(ValueError, match=r"k0.seg.apng is in its metadata.jsonl, but is not a"):
        ImageFolder().read(less)
    more = {**files, mask.replace("k0", "k1"): PNG}
    with pytest.raises(ValueError, match=r"k1.seg.apng is not listed in the metadata.jsonl"):
        ImageFolder().read(more)
    text = next(name for name in files if name.endswith(".jsonl"))
    other = {**files, text: files[text].replace(b"k0.seg.apng", b"../../x.apng")}
    with pytest.raises(ValueError, match=r"is '../../x.apng', which is not its name"):
        ImageFolder().read(other)


def test_a_mask_twice_in_a_tar_is_refused() -> None:
    table = table_of([{"bytes": PNG, "path": None}], [None])
    files = {file.name: file.data for file in WebDataset().files(table, 0, 1)}
    name = next(name for name in files if name.endswith(".tar"))
    with tarfile.open(fileobj=io.BytesIO(files[name])) as archive:
        members = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    row = json.loads(members["k0.json"]) | {"label_mask": None}
    members["k0.json"] = json.dumps(row).encode()
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="k0 has its label_mask twice"):
        WebDataset().read({**files, name: sink.getvalue()})


# The contact sheet and the report


def test_a_box_is_drawn_on_the_pixels_at_its_border() -> None:
    plain = png(40, 20, (0, 0, 0))
    red = (255, 0, 0)
    with Image.open(io.BytesIO(marked(plain, [Mark(0.25, 0.5, 0.75, 1.0, red)]))) as image:
        pixels = np.asarray(image)
    drawn = np.argwhere((pixels == red).all(axis=2))  # (n, 2) rows and columns
    wanted = [
        (row, column)
        for row in range(10, 20)
        for column in range(10, 30)
        if row in (10, 19) or column in (10, 29)
    ]
    assert sorted(map(tuple, drawn.tolist())) == wanted


@given(st.lists(st.tuples(*[st.floats(-1, 2)] * 4), max_size=3))
def test_boxes_never_reach_out_of_their_image(sides: list[tuple[float, ...]]) -> None:
    marks = [Mark(*one, colour=(255, 0, 0)) for one in sides]
    sheet = contact_sheet([png(8, 8, (0, 0, 0))] * 2, ["", ""], [marks, []])
    other = contact_sheet([png(8, 8, (0, 0, 0))] * 2, ["", ""])
    found, plain = (np.asarray(Image.open(io.BytesIO(one))) for one in (sheet, other))
    changed = np.argwhere((found != plain).any(axis=2))
    assert not len(changed) or (changed.min() >= 8 and changed.max() < 8 + 128)


@pytest.mark.parametrize("name", FORMATS)
def test_the_sheet_shows_boxes_in_the_colour_of_their_category(name: str, whole: Path) -> None:
    ledger = at(whole / name)
    plan = ledger.require_plan()
    unreadable: list[str] = []
    shown = {one.key: one for one in shown_of(plan, ledger, [0, 1, 2], unreadable)}
    assert (len(shown), unreadable) == (ROWS, [])
    colours = [colour_of(number, plan) for number in range(3)]
    assert len(set(colours)) == 3
    for row in range(ROWS):
        one = shown[f"a-{row:08d}-v0"]
        if row in (VOID_ROW, EMPTY_ROW):
            assert one.marks == () and one.data == one.plain
            continue
        assert [mark.colour for mark in one.marks] == colours
        assert one.marks[0][:4] == pytest.approx((1 / 16, 2 / 8, 5.5 / 16, 5.25 / 8))
        assert one.data != one.plain
        assert thumbnail(one.data, 128) != one.plain
    assert colour_of("person", plan) == colour_of(0, plan)
    assert colour_of("tree", plan) == colours[2] == (0, 160, 20)


def test_a_column_named_objects_that_is_no_label_draws_nothing(whole: Path, tmp_path: Path) -> None:
    ledger = labelled_output(whole / "a.parquet", tmp_path / "out")
    plan = ledger.require_plan()
    assert "objects" in {name for name, _ in plan.columns}
    shown = list(shown_of(plan, ledger, [0, 1, 2], []))
    assert len(shown) == ROWS and all(one.marks == () for one in shown)


def test_the_card_has_categories_tasks_and_names(whole: Path) -> None:
    for name in FORMATS:
        card = (whole / name / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["task_categories"] == [
            *("image-to-image", "object-detection", "image-segmentation")
        ]
        assert "## Categories of objects" in card and f"| 1 | {CATEGORIES[1]['name']} |" in card
        assert ('ClassLabel(names=["ant", "bee", "cat"])' in card) == (name != "parquet")
