"""Reads an output of any format with plain libraries, without batchgen, to check batchgen."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

Row = dict[str, Any]
OWN = ("prompt", "seed", "variant", "source_id", "width", "height", "sha256", "model_id", "task")


def read(output: Path) -> dict[str, tuple[str, Row]]:
    """Key -> digest of the image's pixels, and its row as JSON has it (Parquet: our own columns).

    Raises AssertionError where a key stands twice, or an image is not that of its row.
    """
    found: dict[str, tuple[str, Row]] = {}
    for key, image, row in _samples(output / "data"):
        assert key == row["key"] and key not in found
        assert hashlib.sha256(image).hexdigest() == row["sha256"]
        with Image.open(io.BytesIO(image)) as opened:
            assert opened.size == (row["width"], row["height"])
            pixels = np.asarray(opened.convert("RGB")).tobytes()
        found[key] = hashlib.sha256(pixels).hexdigest(), row
    return found


def own_columns(found: dict[str, tuple[str, Row]]) -> dict[str, tuple[str, Row]]:
    """The columns that all formats store in the same form."""
    return {
        key: (digest, {name: row[name] for name in OWN}) for key, (digest, row) in found.items()
    }


def _samples(data: Path) -> Iterator[tuple[str, bytes, Row]]:
    for path in sorted(data.rglob("*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=["key", "image", *OWN])
            for row in table.to_pylist():
                image = row.pop("image")
                yield image["path"].removesuffix(".png"), image["bytes"], row
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                members = {one.name: archive.extractfile(one) for one in archive}
                told = {name: file.read() for name, file in members.items() if file is not None}
            for name in told:
                if name.endswith(".png"):
                    key = name.removesuffix(".png")
                    yield key, told[name], json.loads(told[f"{key}.json"])
        elif path.name == "metadata.jsonl":
            for line in path.read_bytes().splitlines():  # as text it breaks at U+0085, too
                row = json.loads(line)
                image = path.parent / row["file_name"]
                yield image.stem, image.read_bytes(), row
