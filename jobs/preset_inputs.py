"""Writes photos to try presets with: drawn shapes with a class, a key, and their objects."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.task_inputs import BOX, PAIRS, SHAPES, drawn, png

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NUMBERS = pa.list_(pa.float64())
OBJECTS = pa.struct([("bbox", pa.list_(NUMBERS)), ("category", pa.list_(pa.int64()))])


def rows() -> list[dict[str, Any]]:
    """One row for each shape and pair of colours."""
    left, top, right, bottom = BOX
    box = [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]
    return [
        {
            "key": f"{shape}-{front}-{back}",
            "image": {"bytes": png(drawn(shape, front, back)), "path": None},
            "label": SHAPES.index(shape),
            "colour": front,
            "background": back,
            "objects": {"bbox": [box], "category": [SHAPES.index(shape)]},
        }
        for shape, (front, back) in itertools.product(SHAPES, PAIRS)
    ]


def main(path: str) -> None:
    label = {"names": list(SHAPES), "_type": "ClassLabel"}
    number = {"dtype": "float64", "_type": "Value"}
    boxes = {"feature": {"feature": number, "_type": "List"}, "_type": "List"}
    features = {
        "image": {"_type": "Image"},
        "label": label,
        "objects": {"bbox": boxes, "category": {"feature": label, "_type": "List"}},
    }
    parts = {"key": "key", "image": "image", "label": "label", "objects": "objects"}
    text = pa.string()
    fields = [("key", text), ("image", IMAGE), ("label", pa.int64())]
    fields += [("colour", text), ("background", text), ("objects", OBJECTS)]
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "batchgen": json.dumps({"columns": parts}),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows(), pa.schema(fields, metadata)), path)


if __name__ == "__main__":
    main(sys.argv[1])
