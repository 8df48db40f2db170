"""Labels of rows: read in every form, refused when wrong, moved, drawn, and withdrawn."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batchgen.errors import InputError, RejectRow, SpecError
from batchgen.labels.columns import labels_schema, objects_type
from batchgen.labels.mask import read_mask
from batchgen.labels.objects import LabelObject, read_objects
from batchgen.labels.rle import encoded
from batchgen.plan.checks import settle
from batchgen.plan.labels import check_labels, label_notes
from batchgen.plan.plan import Plan
from batchgen.shard.prepare import Prepared, prepare
from batchgen.spec.spec import Spec
from tests.datasets_on_disk import model_for, spec_for
from tests.unit.test_prepare import reasons, shard_of

SIZE = (64, 48)


def file(size: tuple[int, int] = SIZE, mode: str = "RGB", fill: Any = 90, **how: Any) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, fill).save(sink, "PNG", **how)
    return sink.getvalue()


def one(**fields: Any) -> dict[str, Any]:
    return {"bbox": [10.0, 10.0, 20.0, 16.0], "category": 1, **fields}


def labelled(task: str = "image-to-image", parts: tuple[str, ...] = (), **dotted: Any) -> Plan:
    mapped = {f"input__columns__{part}": part for part in ("image", "objects", *parts)}
    spec = spec_for("in", task=task, **{**mapped, "labels__categories": ["cat", "dog"], **dotted})
    model = model_for(spec)
    return Plan(settle(spec, model), model, (), (), 0)


def prepared(objects: list[Any], plan: Plan, **columns: Any) -> Prepared:
    count = len(objects)
    table = {
        "prompt": ["a"] * count,
        "image": [file()] * count,
        "objects": objects,
        **{name: values for name, values in columns.items()},
    }
    return prepare(shard_of(table), plan)


def told(result: Prepared, row: int = 0) -> dict[str, Any]:
    assert result.labels is not None, result.dropped
    found: dict[str, Any] = result.labels.slice(row, 1).to_pylist()[0]
    return found


def test_boxes_follow_the_crop_and_the_row_says_how() -> None:
    plan = labelled(sampling__width=48, sampling__height=48, sampling__strength=0.3)
    found = told(prepared([[one(), one(bbox=[0, 0, 9, 9])]], plan))
    assert found["labels_are"] == "kept"
    assert (found["source_width"], found["source_height"]) == SIZE
    assert found["fit"] == [1.0, 0.0, -8.0, 0.0, 1.0, 0.0]
    assert found["objects"]["bbox"] == [[2.0, 10.0, 20.0, 16.0], [0.0, 0.0, 1.0, 9.0]]
    assert found["objects"]["category"] == [1, 1]
    assert found["objects_dropped"] == 0


def test_objects_of_which_too_little_is_left_are_dropped_and_counted() -> None:
    plan = labelled(
        sampling__width=48, sampling__height=48, sampling__strength=0.3, labels__min_visibility=0.5
    )
    found = told(prepared([[one(), one(bbox=[0, 0, 9, 9])]], plan))
    assert found["objects"]["bbox"] == [[2.0, 10.0, 20.0, 16.0]]
    assert found["objects_dropped"] == 1


@pytest.mark.parametrize(
    ("strength", "are"), [(0.2, "kept"), (0.5, "kept"), (0.51, "void"), (1.0, "void")]
)
def test_image_to_image_keeps_labels_up_to_a_strength(strength: float, are: str) -> None:
    found = told(prepared([[one()]], labelled(sampling__strength=strength)))
    assert found["labels_are"] == are
    assert (found["objects"] is None) == (are == "void")


def test_strength_by_row_decides_by_row() -> None:
    plan = labelled(parts=("strength",))
    result = prepared([[one()], [one()]], plan, strength=[0.2, 0.9])
    assert [told(result, row)["labels_are"] for row in (0, 1)] == ["kept", "void"]


def test_a_struct_of_lists_reads_like_a_list_of_structs() -> None:
    plan = labelled(sampling__strength=0.2)
    lists = {"bbox": [[10.0, 10.0, 20.0, 16.0]], "category": [1], "id": [7], "area": [320.0]}
    found = told(prepared([lists], plan))
    assert found["objects"]["id"] == [7]
    assert found == told(prepared([[one(id=7, area=320.0)]], plan))


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("coco", [16.0, 12.0, 32.0, 24.0]),
        ("voc", [16.0, 12.0, 48.0, 36.0]),
        ("yolo", [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_each_format_of_boxes_gives_the_same_box(box_format: str, box: list[float]) -> None:
    (found,) = read_objects([one(bbox=box)], SIZE, box_format, None, "objects")
    assert found.box == (16.0, 12.0, 32.0, 24.0)


RLE = encoded(np.ones((48, 64), bool))
BAD: list[tuple[Any, str]] = [
    ([one(bbox=[10, 10, -1, 5])], "positive size"),
    ([one(bbox=[10, 10, 0, 5])], "positive size"),
    ([one(bbox=[10, 10, float("nan"), 5])], "finite numbers"),
    ([one(bbox=[10, 10, float("inf"), 5])], "finite numbers"),
    ([one(bbox=[-30, 10, 20, 5])], "inside of their image"),
    ([one(bbox=[40, 10, 90, 5])], "inside of their image"),
    ([one(bbox=[1, 2, 3])], "4 numbers"),
    ([one(bbox=None)], "a list of numbers"),
    ([{"bbox": [1.0, 2.0, 3.0, 4.0]}], "in `category`"),
    ([one(category=2)], "0 to 1 (labels.categories"),
    ([one(category=-1)], "0 to 1 (labels.categories"),
    ([one(segmentation=[[1.0, 2.0, 3.0, 4.0]])], "3 points or more"),
    ([one(segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]])], "finite numbers"),
    ([one(keypoints=[1.0, 2.0])], "x, y and visibility"),
    ([one(rle={"size": [64, 48], "counts": RLE.counts})], "rle of size [64, 48]"),
    ([one(rle={"size": [48, 64], "counts": "!!"})], "rle whose counts"),
    ([one(rle={"size": [48, 64], "counts": "9"})], "rle whose counts"),
    ([one(rle={"size": [48, 64], "counts": [5, 6]})], "runs add up to 11 pixels"),
    ([one(rle={"size": [48, 64], "counts": [-5, 6]})], "no run lengths"),
    ([one(id=3), one(id=3)], "two objects with the id 3"),
    ({"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1, 1]}, "one entry for each object"),
]


@pytest.mark.parametrize(("objects", "words"), BAD)
def test_a_wrong_label_rejects_its_row_alone(objects: Any, words: str) -> None:
    with pytest.raises(RejectRow) as caught:
        read_objects(objects, SIZE, "coco", ("cat", "dog"), "boxes")
    assert caught.value.reason == "bad-objects"
    assert words in str(caught.value) and "column 'boxes'" in str(caught.value)


def test_a_row_with_a_wrong_label_is_rejected_and_the_others_stay() -> None:
    plan = labelled(sampling__strength=0.2)
    result = prepared([[one()], [one(bbox=[90.0, 1.0, 5.0, 5.0])], None, []], plan)
    assert reasons(result) == [("a.parquet#1", "bad-objects")]
    assert told(result, 1) == dict.fromkeys(told(result, 1))
    assert told(result, 2)["objects"]["bbox"] == []
    assert told(result, 3)["objects"]["bbox"] == []


def test_voc_corners_read_as_coco_are_refused() -> None:
    with pytest.raises(RejectRow, match=r"labels\.objects_format is coco"):
        read_objects([one(bbox=[30.0, 20.0, 60.0, 40.0])], SIZE, "coco", None, "objects")


@pytest.mark.parametrize("grown", [0, 3])
def test_inpainting_drops_what_it_repaints_and_keeps_the_rest(grown: int) -> None:
    plan = labelled("inpainting", ("mask",), sampling__width=64, sampling__height=48)
    mask = Image.new("L", SIZE)
    mask.paste(255, (8 - grown, 8, 32, 28))
    sink = io.BytesIO()
    mask.save(sink, "PNG")
    away = one(bbox=[44.0, 4.0, 12.0, 12.0], category=0)
    found = told(prepared([[one(), away]], plan, mask=[sink.getvalue()]))
    assert found["labels_are"] == "repainted"
    assert found["objects"]["bbox"] == [[44.0, 4.0, 12.0, 12.0]]
    assert found["objects_dropped"] == 1
    found = told(prepared([[away]], plan, mask=[sink.getvalue()]))
    assert found["labels_are"] == "kept"


def test_a_repainted_object_gets_the_rows_new_category() -> None:
    plan = labelled("inpainting", ("mask", "new_category"), sampling__width=64, sampling__height=48)
    whole = file(mode="L", fill=255)
    result = prepared([[one(), one()]], plan, mask=[whole], new_category=["cat"])
    assert told(result)["objects"]["category"] == [0, 0]
    assert told(result)["labels_are"] == "repainted"
    refused = prepared([[one()]], plan, mask=[whole], new_category=["cow"])
    assert reasons(refused) == [("a.parquet#0", "bad-objects")]


@pytest.mark.parametrize(
    ("task", "are"),
    [("text-to-image", "void"), ("super-resolution", "kept"), ("image-edit", "kept")],
)
def test_the_task_says_what_labels_can_be(task: str, are: str) -> None:
    from batchgen.labels.truth import truth_of

    assert truth_of(labelled().spec.labels, task, None, ("image",), made=False) == are


def test_a_statement_overrides_the_task() -> None:
    plan = labelled(sampling__strength=0.9, labels__are="requested")
    assert told(prepared([[one()]], plan))["labels_are"] == "requested"


def test_a_label_mask_follows_by_nearest_neighbour_and_keeps_its_palette() -> None:
    classes = np.zeros((48, 64), np.uint8)
    classes[:, 32:] = 7
    image = Image.fromarray(classes)
    image.putpalette(bytes(range(256)) * 3)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    plan = labelled(parts=("label_mask",), sampling__strength=0.2, conditioning__resize="fit")
    found = told(prepared([[]], plan, label_mask=[sink.getvalue()]))
    moved = Image.open(io.BytesIO(found["label_mask"]["bytes"]))
    assert moved.mode == "P" and moved.getpalette() == image.getpalette()
    width, height = plan.spec.sampling.width, plan.spec.sampling.height
    assert moved.size == (width, height)
    levels = set(np.asarray(moved).ravel().tolist())
    assert levels <= {0, 7, 255} and {0, 7} <= levels


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file((63, 40), "L", 1), "bad-label_mask"),
        (file(mode="RGB"), "unsupported-label_mask"),
        (b"no image", "undecodable-label_mask"),
        (b"", "null-label_mask"),
    ],
)
def test_a_wrong_label_mask_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(RejectRow) as caught:
        read_mask(data, 1 << 20, SIZE)
    assert caught.value.reason == reason


def test_sixteen_bit_classes_stay() -> None:
    classes = np.full((48, 64), 40_000, np.uint16)
    sink = io.BytesIO()
    Image.fromarray(classes).save(sink, "PNG")
    mask = read_mask(sink.getvalue(), 1 << 20, SIZE)
    again = np.asarray(Image.open(io.BytesIO(mask.png())))
    assert again.max() == again.min() == 40_000


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_on_stored_pixels_are_turned_with_the_photograph(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((48, 64), np.uint8)
    stored[10:26, 10:30] = 1
    sink = io.BytesIO()
    Image.fromarray(stored * 255).convert("RGB").save(sink, "PNG", exif=exif)
    mask = io.BytesIO()
    Image.fromarray(stored).save(mask, "PNG")
    upright = (48, 64) if orientation >= 5 else (64, 48)
    plan = labelled(
        parts=("label_mask",),
        labels__orientation="stored",
        sampling__strength=0.2,
        sampling__width=upright[0],
        sampling__height=upright[1],
    )
    result = prepared([[one()]], plan, image=[sink.getvalue()], label_mask=[mask.getvalue()])
    found = told(result)
    assert (found["source_width"], found["source_height"]) == (64, 48)
    shown = result.images["image"][0][:, :, 0] > 128
    rows, columns = np.nonzero(shown)
    ((x, y, width, height),) = found["objects"]["bbox"]
    assert (columns.min(), rows.min()) == (x, y)
    assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
    classes = np.asarray(Image.open(io.BytesIO(found["label_mask"]["bytes"])))
    assert np.array_equal(classes == 1, shown)


# --- conditions drawn from labels ----------------------------------------------------------------


def drawn(maker: str, part: str, objects: list[Any], task: str = "inpainting", **more: Any) -> Any:
    options = more.pop("options", {})
    columns = more.pop("columns", {})
    make = {part: {"name": maker, "options": options}}
    plan = labelled(
        task,
        tuple(columns),
        conditioning__make=make,
        sampling__width=64,
        sampling__height=48,
        **more,
    )
    result = prepared([objects], plan, **columns)
    assert not result.dropped, result.dropped
    return result, plan


def test_a_mask_is_drawn_where_objects_are() -> None:
    result, _ = drawn("objects-mask", "mask", [one()])
    mask = result.images["mask"][0]
    assert mask.shape == (48, 64) and set(np.unique(mask)) == {0, 255}
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 25, 10, 29)
    assert told(result)["labels_are"] == "repainted"


def test_the_background_alone_is_repainted_and_the_objects_stay_true() -> None:
    result, _ = drawn("objects-mask", "mask", [one()], options={"invert": 1, "grow": 2})
    assert result.images["mask"][0][18, 20] == 0 and result.images["mask"][0][0, 0] == 255
    assert told(result)["labels_are"] == "kept"
    assert told(result)["objects"]["bbox"] == [[10.0, 10.0, 20.0, 16.0]]


def test_a_mask_of_nothing_rejects_the_row() -> None:
    plan = labelled("inpainting", conditioning__make={"mask": {"name": "objects-mask"}})
    assert reasons(prepared([[]], plan)) == [("a.parquet#0", "empty-mask")]


def test_a_class_is_repainted_and_its_label_withdrawn() -> None:
    classes = np.zeros((48, 64), np.uint8)
    classes[4:20, 4:20] = 3
    sink = io.BytesIO()
    Image.fromarray(classes).save(sink, "PNG")
    result, _ = drawn(
        "class-mask",
        "mask",
        [],
        options={"number": 3},
        columns={"label_mask": [sink.getvalue()]},
    )
    assert (result.images["mask"][0] == 255).sum() == 256
    after = np.asarray(Image.open(io.BytesIO(told(result)["label_mask"]["bytes"])))
    assert (after == 255).sum() == 256 and (after == 3).sum() == 0


@pytest.mark.parametrize(
    ("dotted", "field"),
    [
        ({"conditioning__make": {"mask": "palette"}}, "conditioning.make.mask"),
        ({"conditioning__make": {"image": "objects-mask"}}, "conditioning.make.image"),
        (
            {"conditioning__make": {"mask": "objects-mask"}, "input__columns__mask": "mask"},
            "input.columns.mask",
        ),
        (
            {"conditioning__make": {"mask": "class-mask"}},
            "input.columns.label_mask",
        ),
    ],
)
def test_a_maker_that_does_not_fit_is_named(dotted: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        labelled("inpainting", **dotted)
    assert field in str(caught.value)


# --- planning ------------------------------------------------------------------------------------

OBJECTS = pa.list_(
    pa.struct([("bbox", pa.list_(pa.float32())), ("category", pa.int64()), ("id", pa.int64())])
)


def spec_with(**dotted: Any) -> Spec:
    return spec_for("in", task="image-to-image", input__columns__image="image", **dotted)


def test_categories_are_those_that_the_input_declares() -> None:
    metadata = {
        "huggingface": '{"info": {"features": {"objects": {"feature": {"category": {"names": '
        '["cat", "dog"], "_type": "ClassLabel"}}, "_type": "List"}}}}'
    }
    schema = pa.schema([("image", pa.binary()), ("objects", OBJECTS)], metadata=metadata)
    spec = check_labels(spec_with(input__columns__objects="objects"), schema, "a.parquet")
    assert spec.labels.names == ("cat", "dog")
    given = spec_with(input__columns__objects="objects", labels__categories=["a", "b"])
    assert check_labels(given, schema, "a.parquet").labels.names == ("a", "b")


def test_a_column_of_another_type_is_refused() -> None:
    schema = pa.schema([("image", pa.binary()), ("objects", pa.list_(pa.float32()))])
    with pytest.raises(InputError, match="with the fields bbox and category"):
        check_labels(spec_with(input__columns__objects="objects"), schema, "a.parquet")


@pytest.mark.parametrize(
    "dotted", [{"labels__min_visibility": 0.5}, {"input__columns__image_width": "w"}]
)
def test_settings_of_labels_without_labels_are_refused(dotted: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="no labels are read"):
        check_labels(spec_with(**dotted), pa.schema([("image", pa.binary())]), "a.parquet")


def test_undeclared_labels_are_told_before_the_run() -> None:
    columns = [
        ("image", "binary"),
        ("objects", str(OBJECTS)),
        ("segmentation_mask", "binary"),
        ("caption", "string"),
    ]
    notes = list(label_notes(spec_with(), columns))
    assert len(notes) == 2 and "'objects'" in notes[0] and "'segmentation_mask'" in notes[1]
    declared = spec_with(input__columns__objects="objects", sampling__strength=0.9)
    assert ["void" in note for note in label_notes(declared, columns)] == [True, False]
    assert not list(label_notes(spec_with(input__keep_columns=["caption"]), columns))


def test_the_output_keeps_fields_that_nobody_knows() -> None:
    kind = pa.struct(
        [
            ("bbox", pa.list_(pa.list_(pa.float32()))),
            ("category", pa.list_(pa.string())),
            ("occluded", pa.list_(pa.bool_())),
        ]
    )
    found = objects_type(kind)
    assert [field.name for field in found] == ["bbox", "category", "occluded"]
    assert found.field("category").type == pa.list_(pa.string())
    assert objects_type(kind, named=True).field("category").type == pa.list_(pa.int64())
    assert found.field("occluded").type == pa.list_(pa.bool_())
    assert labels_schema(kind, True).names == [
        *("label_mask", "objects", "labels_are", "objects_dropped"),
        *("source_width", "source_height", "fit"),
    ]


def test_an_object_without_a_polygon_is_its_box() -> None:
    mask = LabelObject((2, 3, 4, 5), 0).mask((10, 10))
    assert mask.sum() == 20 and mask[3:8, 2:6].all()
