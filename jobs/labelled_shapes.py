"""Writes images of drawn shapes with labels that are known: boxes, polygons, keypoints, masks.

    python jobs/labelled_shapes.py out/labelled-shapes.parquet

Each image is a scene of 96 x 64 pixels with a shape in each half, in the captions and colours that
the shipped model has learned.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 64
NAMES = ("square", "triangle", "circle")
COLOURS = {
    "red": (214, 36, 40),
    "yellow": (246, 222, 48),
    "blue": (36, 80, 214),
    "purple": (136, 48, 168),
    "white": (244, 244, 244),
    "black": (16, 16, 16),
}
PAIRS = (("red", "white"), ("blue", "yellow"), ("white", "purple"), ("white", "black"))
ROWS = 12

OBJECTS = pa.struct(
    [
        ("id", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
        ("category", pa.list_(pa.int64())),
        ("area", pa.list_(pa.float64())),
        ("iscrowd", pa.list_(pa.int8())),
        ("segmentation", pa.list_(pa.list_(pa.list_(pa.float64())))),
        ("keypoints", pa.list_(pa.list_(pa.float64()))),
    ]
)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def polygon(name: str, x: float, y: float, size: float) -> list[float]:
    """The outline of a shape in a square: x, y, x, y, ... in pixels."""
    if name == "square":
        return [x, y, x + size, y, x + size, y + size, x, y + size]
    if name == "triangle":
        return [x, y + size, x + size / 2, y, x + size, y + size]
    turns = [2 * math.pi * step / 24 for step in range(24)]
    half = size / 2
    points = [(x + half + half * math.cos(t), y + half + half * math.sin(t)) for t in turns]
    return [value for point in points for value in point]


def area(outline: list[float]) -> float:
    points = list(zip(outline[::2], outline[1::2], strict=True))
    turned = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turned)) / 2


def row(number: int, scale: int = 1) -> dict[str, Any]:
    """One scene, ``scale`` times as large."""
    front, back = PAIRS[number % len(PAIRS)]
    names = [NAMES[number % 3], NAMES[(number // 3) % 3]]
    width, height = scale * WIDTH, scale * HEIGHT
    small = [(12.0 + 2 * (number % 4), 16.0, 28.0), (56.0, 12.0 + 2 * (number % 5), 30.0)]
    places = [(scale * x, scale * y, scale * size) for x, y, size in small]
    outlines = [polygon(name, *place) for name, place in zip(names, places, strict=True)]
    scene = Image.new("RGB", (4 * width, 4 * height), COLOURS[back])
    classes = Image.new("L", (4 * width, 4 * height), 0)
    for name, outline in zip(names, outlines, strict=True):
        large = [4 * value for value in outline]
        ImageDraw.Draw(scene).polygon(large, fill=COLOURS[front])
        ImageDraw.Draw(classes).polygon(large, fill=NAMES.index(name) + 1)
    return {
        "key": f"scene-{number:03d}",
        "prompt": f"a {front} {names[0]} on a {back} background",
        "image": {"bytes": png(scene.resize((width, height), Image.Resampling.BOX)), "path": None},
        "objects": {
            "id": [2 * number + 1, 2 * number + 2],
            "bbox": [[x, y, size, size] for x, y, size in places],
            "category": [NAMES.index(name) for name in names],
            "area": [area(outline) for outline in outlines],
            "iscrowd": [0, 0],
            "segmentation": [[outline] for outline in outlines],
            "keypoints": [[x + size / 2, y + size / 2, 2.0] for x, y, size in places],
        },
        "label_mask": {
            "bytes": png(classes.resize((width, height), Image.Resampling.NEAREST)),
            "path": None,
        },
    }


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def table(scale: int = 1) -> pa.Table:
    label = {"names": list(NAMES), "_type": "ClassLabel"}
    features = {
        "image": {"_type": "Image"},
        "label_mask": {"_type": "Image"},
        "objects": {"category": {"feature": label, "_type": "List"}},
    }
    columns = {name: name for name in ("key", "prompt", "image", "objects", "label_mask")}
    kinds = [pa.string(), pa.string(), IMAGE, OBJECTS, IMAGE]
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "batchgen": json.dumps(
            {"columns": columns, "mask_classes": [{"name": one} for one in ("ground", *NAMES)]}
        ),
    }
    schema = pa.schema(list(zip(columns, kinds, strict=True)), metadata=metadata)
    return pa.Table.from_pylist([row(number, scale) for number in range(ROWS)], schema=schema)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(), target)
    print(f"{target}: {ROWS} images of {WIDTH} x {HEIGHT} pixels with {2 * ROWS} objects")
