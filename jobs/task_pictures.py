"""Makes the pictures in `docs/images/tasks` from finished runs of the specs in `jobs/tasks`.

    python jobs/task_pictures.py [TASK ...]

Every row is shown, none chosen: what the model was given, and at its right what it made of that.
Without a name, all tasks that the shipped model serves and whose runs are there.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.plan.plan import Plan
from batchgen.plan.saved import read_plan
from batchgen.shard.prepare import prepare
from batchgen.spec.tasks import TASK_NAMES

RUNS, PICTURES = Path("out/tasks"), Path("docs/images/tasks")
SHIPPED = "digits-shapes"
SIDE = 96  # pixels of an image on the page
GAP, BREAK = 4, 28  # between images, between rows' blocks
HEAD, CAPTION = 18, 18
MAX_WIDTH = 840
COLOURS = 240  # a palette of so many keeps the files small


@dataclass
class Block:
    """A row of the input: the images it brought, those made from it, and what it asked for."""

    caption: str
    given: dict[str, Image.Image] = field(default_factory=dict)
    made: list[Image.Image] = field(default_factory=list)


def blocks(run: Path) -> list[Block]:
    """One for each row of which something was made, in the order of the input."""
    plan = read_plan((run / "_batchgen" / "plan.json").read_text())
    found: dict[str, Block] = {}
    for source_id, given in given_images(plan):
        found[source_id] = Block("", given)
    for row in sorted(pq.read_table(run / "data").to_pylist(), key=lambda row: row["variant"]):
        block = found[row["source_id"]]
        block.caption = row["prompt"] or class_name(plan, row.get("class_label"))
        block.made.append(Image.open(io.BytesIO(row["image"]["bytes"])))
    return [block for block in found.values() if block.made]


def class_name(plan: Plan, number: int | None) -> str:
    names = plan.model.class_names
    return "" if number is None or number >= len(names) else names[number] or str(number)


def given_images(plan: Plan) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    """Each row's images as the model got them: fitted, and with what is made of them."""
    names = [name for name, _ in plan.columns]
    for span in make_spans(plan, range(plan.shards)):
        for rows in read_span(span, plan.spec, read_columns(plan.spec, names)):
            images = prepare(rows, plan).images
            for number, source_id in enumerate(rows.source_ids):
                yield (
                    source_id,
                    {
                        part: Image.fromarray(np.asarray(arrays[number])).convert("RGB")
                        for part, arrays in images.items()
                        if number in arrays
                    },
                )


def sheet(rows: list[Block]) -> Image.Image:
    """The blocks side by side, as many as fit the width, under one line of titles."""
    titles = [*rows[0].given, *(f"variant {number}" for number in range(len(rows[0].made)))]
    font = ImageFont.load_default(11)
    captions = (math.ceil(font.getlength(row.caption)) for row in rows)
    width = max(len(titles) * (SIDE + GAP) - GAP, *captions)
    across = max(1, min(len(rows), (MAX_WIDTH + BREAK) // (width + BREAK)))
    down = -(-len(rows) // across)
    size = across * (width + BREAK) - BREAK + 2 * GAP, HEAD + down * (SIDE + CAPTION + GAP)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for column, (number, title) in itertools.product(range(across), enumerate(titles)):
        left = GAP + column * (width + BREAK) + number * (SIDE + GAP)
        draw.text((left, 2), title, "black", font)
    for place, row in enumerate(rows):
        left = GAP + place % across * (width + BREAK)
        top = HEAD + place // across * (SIDE + CAPTION + GAP)
        for number, one in enumerate([*row.given.values(), *row.made]):
            image.paste(enlarged(one), (left + number * (SIDE + GAP), top))
        draw.text((left, top + SIDE + 2), row.caption, "black", font)
    return image


def enlarged(image: Image.Image) -> Image.Image:
    """By the nearest pixels, since nothing is to be added here; in a frame."""
    framed = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    ImageDraw.Draw(framed).rectangle((0, 0, SIDE - 1, SIDE - 1), outline="lightgrey")
    return framed


def on_shipped_model(task: str) -> bool:
    path = RUNS / task / "_batchgen" / "plan.json"
    return path.is_file() and read_plan(path.read_text()).model.model_id.startswith(SHIPPED)


def main(tasks: Iterable[str]) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for task in tasks or filter(on_shipped_model, TASK_NAMES):
        path = PICTURES / f"{task}.png"
        picture = sheet(blocks(RUNS / task))
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
