"""Finished outputs with labels, made without a model: boxes, polygons, masks, keypoints, splits."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from batchgen.labels.rle import encoded
from batchgen.output.ledger import Ledger
from batchgen.plan.plan import Plan
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, png, write_table

WIDTH, HEIGHT = 16, 8  # of the images made, and of their sources: labels stay where they are
CATEGORIES = [
    {"name": "person", "id": 7, "supercategory": "being", "keypoints": ["nose", "foot"]},
    {"name": "car: red", "id": 3},
    {"name": "tree", "id": 12, "colour": [0, 160, 20]},
]
CATEGORIES[0]["skeleton"] = [[1, 2]]
SPLITS = ["train", "validation", "../x", ""]
ROWS = 12
VOID_ROW = 5  # its strength is too high for its labels
EMPTY_ROW = 4  # it has no object
MASK = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def objects_of(row: int) -> dict[str, list[Any]]:
    """A person with keypoints, a car with two polygons, and a crowd of trees with a mask."""
    if row == EMPTY_ROW:
        found: list[dict[str, Any]] = []
    else:
        crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
        crowd[1:3, 9:13] = True
        mask = encoded(crowd)
        found = [
            {
                "id": 100 * row,
                "bbox": [1.0, 2.0, 4.5, 3.25],
                "category": 0,
                "area": 9.5,
                "iscrowd": 0,
                "keypoints": [1.5, 2.5, 2.0, 3.0, 4.0, 1.0],
                "segmentation": [[1.0, 2.0, 5.5, 2.0, 5.5, 5.25, 1.0, 5.25]],
                "score": 0.5,
            },
            {
                "id": 100 * row + 1,
                "bbox": [6.0, 0.0, 10.0, 8.0],
                "category": 1,
                "area": 22.0,
                "iscrowd": 0,
                "segmentation": [
                    [6.0, 0.0, 9.0, 0.0, 9.0, 3.0, 6.0, 3.0],
                    [12.0, 5.0, 16.0, 5.0, 16.0, 8.0, 12.0, 8.0],
                ],
                "score": 0.25,
            },
            {
                "id": 100 * row + 2,
                "bbox": [9.0, 1.0, 4.0, 2.0],
                "category": 2,
                "area": 8.0,
                "iscrowd": 1,
                "rle": {"size": list(mask.size), "counts": mask.counts},
                "score": None,
            },
        ]
    fields = ("id", "bbox", "category", "area", "iscrowd", "segmentation", "rle", "keypoints")
    return {name: [one.get(name) for one in found] for name in (*fields, "score")}


OBJECTS = pa.struct(
    [
        ("id", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
        ("category", pa.list_(pa.int64())),
        ("area", pa.list_(pa.float64())),
        ("iscrowd", pa.list_(pa.int8())),
        ("segmentation", pa.list_(pa.list_(pa.list_(pa.float64())))),
        ("rle", pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())]))),
        ("keypoints", pa.list_(pa.list_(pa.float64()))),
        ("score", pa.list_(pa.float64())),
    ]
)


def mask_of(row: int) -> bytes:
    """A label mask with the classes 0, 1 and 2."""
    classes = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    classes[2:5, row % 4 : row % 4 + 3] = 1 + row % 2
    sink = io.BytesIO()
    Image.fromarray(classes).save(sink, "PNG")
    return sink.getvalue()


def write_source(path: Path, rows: int = ROWS, objects: Sequence[Any] | None = None) -> Path:
    """A dataset of images with all kinds of labels; the label is a ClassLabel."""
    names = ("label", "split", "objects", "label_mask", "image")
    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": png(WIDTH, HEIGHT, (9, row, 99)), "path": None} for row in range(rows)],
            MASK,
        ),
        "prompt": [f"picture {row}" for row in range(rows)],
        "strength": [0.9 if row == VOID_ROW else 0.3 for row in range(rows)],
        "label": pa.array([row % 3 for row in range(rows)], pa.int64()),
        "split": pa.array([SPLITS[row % 4] for row in range(rows)], pa.string()),
        "file_name": [f"photo {row}.jpg" for row in range(rows)],
        "objects": pa.array(objects or [objects_of(row) for row in range(rows)], OBJECTS),
        "label_mask": pa.array(
            [{"bytes": mask_of(row), "path": None} for row in range(rows)], MASK
        ),
    }
    table = pa.table(columns)
    assert set(names) < set(table.column_names)
    features = {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "batchgen": json.dumps({"categories": CATEGORIES}),
    }
    return write_table(path, table.replace_schema_metadata(metadata))


def labelled_plan(source: Path, out: Path, *parts: str, **dotted: Any) -> Plan:
    """A plan for ``write_source`` with these label columns."""
    mapped = {f"input__columns__{part}": part for part in ("image", "strength", "label", *parts)}
    settings = {"task": "image-to-image", "output__samples_per_shard": 5, **mapped, **dotted}
    return plan_for(source, out, **settings)


def labelled_output(source: Path, out: Path, *parts: str, **dotted: Any) -> Ledger:
    """A finished output: three shards of 12 samples."""
    ledger = Ledger(open_store(str(out)))
    make_output(labelled_plan(source, out, *parts, **dotted), ledger)
    return ledger
