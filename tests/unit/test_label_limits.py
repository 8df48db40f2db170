"""Labels at the limits: slivers, tiny objects, odd masks, unnamed categories, strange splits."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batchgen.errors import InputError, RejectRow, SpecError
from batchgen.images.geometry import Affine
from batchgen.labels.mask import read_mask
from batchgen.labels.move import Move
from batchgen.labels.objects import LabelObject, read_objects
from batchgen.labels.row import SourceLabels, row_labels
from batchgen.output.datasets.yolo import meaning
from batchgen.plan.labels import check_labels, label_notes
from tests.datasets_on_disk import spec_for
from tests.unit.test_labels import labelled, one


@pytest.mark.parametrize("box", [[640, 100, 1.5, 20], [-1.5, 100, 1, 20], [10, 480, 5, 2]])
def test_a_box_that_lies_beyond_the_border_is_refused(box: list[float]) -> None:
    with pytest.raises(RejectRow, match="inside of their image"):
        read_objects([one(bbox=box)], (640, 480), "coco", None, "objects")


def test_what_is_left_of_an_object_has_sides_that_can_be_written() -> None:
    move = Move(Affine(x0=-10.0), (100, 100), (50, 100))
    assert move.object(LabelObject((5.0, 5.0, 5.00001, 20.0), 0)) == (None, 0.0)
    assert move.object(LabelObject((5.0, 5.0, 0.0, 20.0), 0)) == (None, 0.0)


def test_an_object_smaller_than_a_pixel_is_repainted_like_any_other() -> None:
    tiny = LabelObject((10.55, 20.55, 0.8, 0.8), 0)
    assert tiny.mask((64, 48)).any()
    area = np.full((48, 64), 255, np.uint8)
    move = Move(Affine(), (64, 48), (64, 48))
    rules = labelled().spec.labels
    labels = SourceLabels((64, 48), (tiny,))
    found = row_labels(labels, 1, move, 1, "repainted", rules, area, None)
    assert (found.are, found.objects, found.dropped) == ("repainted", (), 1)


def test_a_repainted_object_is_a_new_one() -> None:
    crowd = LabelObject((5, 5, 50, 40), 0, area=7.0, iscrowd=1, others={"id": 4, "occluded": True})
    area = np.full((48, 64), 255, np.uint8)
    move = Move(Affine(), (64, 48), (64, 48))
    labels = SourceLabels((64, 48), (crowd,))
    found = row_labels(labels, 1, move, 1, "repainted", labelled().spec.labels, area, 3)
    assert found.objects is not None
    (new,) = found.objects
    assert (new.category, new.area, new.iscrowd, new.others) == (3, None, 0, {"id": 4})


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_keep_their_classes(bits: int) -> None:
    import struct
    import zlib

    classes = np.arange(2**bits, dtype=np.uint8).reshape(1, -1)
    packed = np.packbits(np.unpackbits(classes.T, axis=1)[:, -bits:].ravel())
    head = struct.pack(">IIBBBBB", 2**bits, 1, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" + packed.tobytes())), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert Image.open(io.BytesIO(data)).size == (2**bits, 1)
    assert np.array_equal(read_mask(data, 1 << 20, None).classes, classes)


def test_a_struct_of_nulls_is_no_mask() -> None:
    (found,) = read_objects(
        [one(rle={"size": None, "counts": None})], (64, 48), "coco", None, "objects"
    )
    assert found.rle is None


TEXTS = pa.list_(pa.struct([("bbox", pa.list_(pa.float64())), ("category", pa.string())]))


@pytest.mark.parametrize(
    "made", [{"name": "objects-canvas"}, {"name": "objects-mask", "options": {"category": 0}}]
)
def test_numbers_of_categories_need_their_names(made: dict[str, Any]) -> None:
    is_mask = made["name"] == "objects-mask"
    part, task = ("mask", "inpainting") if is_mask else ("control", "control")
    dotted: dict[str, Any] = {"task": task, "conditioning__make": {part: made}}
    dotted |= {"input__columns__objects": "objects"}
    dotted |= {"input__columns__image": "image"} if is_mask else {}
    schema = pa.schema([("image", pa.binary()), ("objects", TEXTS), ("prompt", pa.string())])
    with pytest.raises(SpecError, match=r"list them in labels\.categories"):
        check_labels(spec_for("in", **dotted), schema, "a.parquet")
    check_labels(spec_for("in", labels__categories=["cat"], **dotted), schema, "a.parquet")


def test_categories_that_a_spec_would_refuse_are_refused_when_declared() -> None:
    label = {"names": ["N/A", "N/A"], "_type": "ClassLabel"}
    features = {"info": {"features": {"objects": {"category": label}}}}
    kind = pa.struct(
        [("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.int64()))]
    )
    schema = pa.schema(
        [("image", pa.binary()), ("objects", kind)], metadata={"huggingface": json.dumps(features)}
    )
    columns = {"input__columns__image": "image", "input__columns__objects": "objects"}
    spec = spec_for("in", task="image-to-image", **columns)
    with pytest.raises(InputError, match=r"give them in labels\.categories"):
        check_labels(spec, schema, "a.parquet")


def test_labels_that_are_asked_for_are_not_told_to_be_void() -> None:
    spec = spec_for(
        "in",
        task="control",
        input__columns__label_mask="mask",
        conditioning__make={"control": "palette"},
    )
    assert not list(label_notes(spec, [("mask", "binary"), ("prompt", "string")]))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("training", "train"), ("Train-u1", "train"), ("train2017", "train")),
        *(("val2017", "validation"), ("dev", "validation"), ("test-dev", None)),
        *(("Test-u1", "test"), ("fold-1", None), ("trainer", None)),
    ],
)
def test_a_split_is_known_by_the_words_of_its_name(name: str, meant: str | None) -> None:
    assert meaning(name) == meant
