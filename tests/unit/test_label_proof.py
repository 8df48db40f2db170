"""`verify` finds labels that no run would write."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from batchgen.output.label_proof import label_faults


def png(size: tuple[int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("L", size).save(sink, "PNG")
    return sink.getvalue()


def row(**changed: Any) -> dict[str, Any]:
    fine = {
        "key": "a-v0",
        "width": 32,
        "height": 16,
        "labels_are": "kept",
        "objects": {"bbox": [[0.0, 0.0, 32.0, 16.0]], "category": [1]},
        "label_mask": {"bytes": png((32, 16)), "path": "a"},
    }
    return {**fine, **changed}


def test_labels_on_their_image_are_fine() -> None:
    void = row(labels_are="void", objects=None, label_mask=None)
    assert not list(label_faults(pa.Table.from_pylist([row(), void, row(label_mask=None)])))
    assert not list(label_faults(pa.table({"key": ["a"]})))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels_are": "true"}, "labels_are is 'true'"),
        ({"labels_are": "void"}, "void, but are written"),
        ({"objects": None}, "objects is null"),
        ({"label_mask": {"bytes": png((16, 16)), "path": "a"}}, "no image of 32 x 16"),
        ({"label_mask": {"bytes": b"?", "path": "a"}}, "no image of 32 x 16"),
        ({"objects": {"bbox": [[1.0, 0.0, 32.0, 4.0]], "category": [1]}}, "not inside of 32 x 16"),
        ({"objects": {"bbox": [[1.0, -2.0, 3.0, 4.0]], "category": [1]}}, "not inside of 32 x 16"),
        ({"objects": {"bbox": [[9.0, 9.0, -3.0, 4.0]], "category": [1]}}, "not inside of 32 x 16"),
    ],
)
def test_each_fault_is_named(changed: dict[str, Any], words: str) -> None:
    (fault,) = label_faults(pa.Table.from_pylist([row(**changed)]))
    assert fault.startswith("labels of a-v0: ") and words in fault
