"""Real handwritten digits as Parquet: a few of each class to train with, and others held out.

    python jobs/real_digits.py out/digits.parquet [--per-class 10] [--test-per-class 20]

The digits are scikit-learn's `load_digits` (UCI, CC BY 4.0), enlarged to 32 x 32. Rows of the split
`test` are those that the shipped model never saw.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

import batchgen

SPLIT = Path(batchgen.__file__).parent / "shipped/digits-shapes/digits_split.json"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDE = 32
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--test-per-class", type=int, default=20)
    asked = parser.parse_args()
    wanted = {"train": asked.per_class, "test": asked.test_per_class}
    digits, train = load_digits(), set(json.loads(SPLIT.read_text())["train"])
    taken: Counter[tuple[str, int]] = Counter()
    rows = []
    for number, (grey, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if number in train else "test"
        if taken[split, int(label)] == wanted[split]:
            continue
        taken[split, int(label)] += 1
        rows.append(
            {
                "key": f"digit-{number:04d}",
                "image": {"bytes": png(grey), "path": None},
                "prompt": f"a handwritten digit {NAMES[label]}",
                "label": NAMES[label],
                "split": split,
            }
        )
    asked.target.parent.mkdir(parents=True, exist_ok=True)
    types = [("key", pa.string()), ("image", IMAGE), ("prompt", pa.string())]
    schema = pa.schema([*types, ("label", pa.string()), ("split", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), asked.target)
    print(f"{asked.target}: {len(rows)} digits")


def png(grey: np.ndarray) -> bytes:
    """An 8 x 8 image of 17 levels as a PNG of 32 x 32."""
    small = Image.fromarray(np.uint8(grey * 255 / 16)).convert("RGB")
    file = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
