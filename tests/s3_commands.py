"""batchgen by its command line, from bucket to bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.storage import open_store


def batchgen(*words: str, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command; of ``environment``, None takes a variable away."""
    changed = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "batchgen", *words],
        cwd=cwd,
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_words(bucket: str) -> list[str]:
    return [
        *("run", "--input", f"{bucket}/in", "--output", f"{bucket}/out", "--steps", "2"),
        *("--samples-per-shard", "4", "--batch-size", "4", "--variants", "2"),
        *("--set", "resources.generate.max_replicas=1"),
    ]


@pytest.fixture
def prompts_there(s3_bucket: str, tmp_path: Path) -> str:
    pq.write_table(
        pa.table({"prompt": ["a red star", "a blue circle"] * 3}), tmp_path / "p.parquet"
    )
    open_store(f"{s3_bucket}/in").put("prompts.parquet", (tmp_path / "p.parquet").read_bytes())
    return s3_bucket
