"""Writes the prompts of `make demo`: every digit and a grid of coloured shapes, as Parquet."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PAIRS = (
    ("red", "white"),
    ("yellow", "blue"),
    ("green", "black"),
    ("white", "purple"),
    ("blue", "yellow"),
    ("orange", "black"),
    ("purple", "green"),
    ("black", "orange"),
    ("white", "red"),
)


def prompts() -> list[tuple[str, str]]:
    """(prompt, label) for 10 digits and 54 shapes."""
    digits = [(f"a handwritten digit {word}", word) for word in DIGITS]
    shapes = [
        (f"{article(front)} {front} {shape} on {article(back)} {back} background", shape)
        for shape, (front, back) in itertools.product(SHAPES, PAIRS)
    ]
    return digits + shapes


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def main(path: str) -> None:
    texts, labels = zip(*prompts(), strict=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": texts, "label": labels}), path)
    print(f"{len(texts)} prompts in {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
