"""Writes the input of the specs in `jobs/tasks`: drawn shapes with all that a task may ask for."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

SIZE = 32  # pixels a side
SHAPES = ("circle", "square", "triangle")
PAIRS = (("red", "white"), ("blue", "yellow"), ("white", "purple"), ("green", "black"))
BOX = (8, 8, 24, 24)  # where the shape stands
TARGETS = ("star", "ring", "cross", "square", "circle", "triangle")
CLASSES = (*TARGETS, "zero", "two", "three", "five", "seven", "eight")


def rows() -> list[dict[str, Any]]:
    """One row for each shape and pair of colours, with a column for every part of every task."""
    found = []
    for number, (shape, (front, back)) in enumerate(itertools.product(SHAPES, PAIRS)):
        picture = drawn(shape, front, back)
        target = TARGETS[number % len(TARGETS)]
        found.append(
            {
                "prompt": caption(target, front, back),
                "recolour": caption(shape, back, front),
                "instruction": f"make it a {target}",
                "image": png(picture),
                "grey": png(picture.convert("L")),
                "mask": png(boxed("black", "white")),
                "map": png(drawn(shape, "white", "black")),
                "small": png(picture.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)),
                "half": png(picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX)),
                "regions": [{"phrase": f"a {front} {target}", "box": [x / SIZE for x in BOX]}],
                "class_label": number % 10,
                "class_name": CLASSES[number],
                "label": target,
            }
        )
    return found


def drawn(shape: str, front: str, back: str) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), back)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = BOX
    if shape == "circle":
        draw.ellipse(BOX, fill=front)
    elif shape == "square":
        draw.rectangle(BOX, fill=front)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=front)
    return image


def boxed(outside: str, inside: str) -> Image.Image:
    """A mask a little larger than the shape."""
    image = Image.new("L", (SIZE, SIZE), outside)
    left, top, right, bottom = BOX
    ImageDraw.Draw(image).rectangle((left - 4, top - 4, right + 3, bottom + 3), fill=inside)
    return image


def caption(shape: str, front: str, back: str) -> str:
    """As the shipped model has learned them."""
    article = "an" if front[0] in "aeiou" else "a"
    return f"{article} {front} {shape} on a {back} background"


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def main(path: str) -> None:
    table = pa.Table.from_pylist(rows())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    print(f"{table.num_rows} rows in {path}: {', '.join(table.column_names)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
