"""Outputs, held-out sets and folders whose images are given as pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchgen.images.files import encode_image
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.labels.columns import IMAGE
from batchgen.output.ledger import Ledger
from batchgen.plan.plan import Plan
from batchgen.records import ImageBatch, LatentBatch
from batchgen.shard.stages import FusedStages
from batchgen.storage import open_store
from tests.arithmetic_stages import SEED, ArithmeticDecoder, ArithmeticDenoiser, ArithmeticEncoder
from tests.datasets_on_disk import plan_for

Array = np.ndarray[Any, Any]
SIDE = 32


class PicturedDecoder(ArithmeticDecoder):
    """A sample's pixels are those of the picture whose number is its seed."""

    def __init__(self, pictures: Sequence[Array]) -> None:
        super().__init__()
        self.pictures = pictures

    def __call__(self, batch: LatentBatch) -> ImageBatch:
        facts = batch.latents.tolist()
        return ImageBatch(
            pixels=np.stack([self.pictures[one[SEED]] for one in facts]),
            finite=(True,) * len(facts),
            truncated=batch.truncated,
        )


def pictured_output(
    folder: Path,
    pictures: Sequence[Array],
    columns: Mapping[str, Any] | None = None,
    name: str = "out",
    **dotted: Any,
) -> Ledger:
    """A finished output with these images of 32 x 32 pixels, in their order."""
    source = folder / f"{name}.parquet"
    numbers = list(range(len(pictures)))
    table = {"prompt": [f"p{one}" for one in numbers], "seed": pa.array(numbers, pa.int64())}
    pq.write_table(pa.table({**table, **(columns or {})}), source)
    settings = {
        "input__columns__seed": "seed",
        "sampling__width": SIDE,
        "sampling__height": SIDE,
        "output__samples_per_shard": 16,
        "resources__batch_size": 4,
        "policy__reject_flat": False,
        **dotted,
    }
    plan = plan_for(source, folder / name, **settings)
    return finished(plan, pictures)


def finished(plan: Plan, pictures: Sequence[Array]) -> Ledger:
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, plan.spec)
    stages = FusedStages(ArithmeticEncoder(), ArithmeticDenoiser(), PicturedDecoder(pictures))  # type: ignore[arg-type]
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    for span in make_spans(plan, ledger.states(plan).pending):
        for rows in read_span(span, plan.spec, columns):
            stages(rows, plan, ledger, attempt=1)
    return ledger


def png(pixels: Array) -> bytes:
    return encode_image(pixels, "png", 90)


def jpeg(pixels: Array, quality: int = 75) -> Array:
    """The pixels after a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def image_set(path: Path, pictures: Sequence[Array], **columns: Any) -> Path:
    """A Parquet file of images as `batchgen import` writes them."""
    keys = columns.pop("key", [f"real-{number}" for number in range(len(pictures))])
    images = [{"bytes": png(one), "path": None} for one in pictures]
    pq.write_table(pa.table({"key": keys, "image": pa.array(images, IMAGE), **columns}), path)
    return path


def textures(count: int, seed: int = 0, side: int = SIDE) -> list[Array]:
    """Different random images with coarse and with fine parts, as photographs have them."""
    generator = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        levels = np.full((side, side, 3), 127.0)
        for cells, height in ((3, 50), (6, 30), (12, 20)):
            small = generator.normal(0, height, (cells, cells, 1)).astype(np.float32)
            tint = generator.normal(1, 0.2, 3)
            part = Image.fromarray(small[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
            levels += np.asarray(part)[..., None] * tint
        pictures.append(np.clip(levels, 0, 255).astype(np.uint8))
    return pictures
