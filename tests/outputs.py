"""Reads an output with only pyarrow, as a user without batchgen would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tree import merge


def spec_for(source: Path, output: Path, **dotted: Any) -> Spec:
    """A small text-to-image job on the shipped model; keywords use ``__`` for dots."""
    tree = {"input": {"path": str(source)}, "output": {"url": str(output), "samples_per_shard": 4}}
    settings = {
        "sampling.num_inference_steps": 2,
        "resources.batch_size": 2,
        "resources.generate.max_replicas": 1,  # each one costs seconds of imports
        "resources.denoise.max_replicas": 1,
    }
    settings |= {name.replace("__", "."): value for name, value in dotted.items()}
    return build(merge(tree, settings))


def table_of(output: Path) -> pa.Table:
    """All accepted samples."""
    return pa.concat_tables(pq.read_table(file) for file in sorted((output / "data").iterdir()))


def digests_of(output: Path) -> dict[str, str]:
    """key -> sha256 of the accepted samples; fails if a key stands twice."""
    table = table_of(output)
    keys = table.column("key").to_pylist()
    assert len(keys) == len(set(keys))
    return dict(zip(keys, table.column("sha256").to_pylist(), strict=True))


def rejects_of(output: Path) -> list[dict[str, Any]]:
    """All samples that are not in ``data/``."""
    files = sorted((output / "_batchgen" / "rejects").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]
