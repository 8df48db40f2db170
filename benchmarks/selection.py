"""A new threshold over a million samples: time and memory of `batchgen select`.

    python benchmarks/selection.py [--samples 1000000]

Makes an output whose samples have 200 bytes of image each and columns of their own, and two score
sets, and runs the command three times for each query, in processes of their own: over the output's
columns alone, and joined with the score sets. Writes ``results/selection.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen import runner
from batchgen.curate.score_sets import store_scores
from batchgen.output.formats import parquet_bytes
from batchgen.output.ledger import Ledger, data_name
from batchgen.output.marker import Counts, Marker, Written
from batchgen.plan.plan import Plan
from batchgen.spec.build import build
from batchgen.stages.scorers.scorer import ScoreColumn
from batchgen.storage import open_store

ROOT = Path(__file__).parents[1]
SHARD = 10_000
IMAGE = 200  # bytes
QUERIES = {
    "band": ["--where", "pixel_std between 20 and 60 and pixel_mean > 40"],
    "best of each class": ["--top", "500", "--by", "pixel_std", "--per", "label"],
    "band of a score": ["--where", "class_agrees and class_margin between 0.05 and 0.4"],
    "best of each class by a score": ["--top", "500", "--by", "class_margin", "--per", "label"],
    "columns of both score sets": [
        "--where",
        "class_margin > 0.1 and bit_count(phash) > 20 and not is_blank and pixel_std > 20",
    ],
}
CLASSIFIER = (
    ScoreColumn("predicted_label", pa.string(), "made up"),
    ScoreColumn("class_agrees", pa.bool_(), "made up"),
    ScoreColumn("class_probability", pa.float32(), "made up"),
    ScoreColumn("class_margin", pa.float32(), "made up"),
    ScoreColumn("class_entropy", pa.float32(), "made up"),
)
LOOKS = (
    ScoreColumn("phash", pa.uint64(), "made up"),
    ScoreColumn("sharpness", pa.float32(), "made up"),
    ScoreColumn("is_blank", pa.bool_(), "made up"),
)


def make(folder: Path, samples: int) -> Ledger:
    """An output with markers and data files as a run writes them, with columns made up."""
    source = folder / "in.parquet"
    pq.write_table(pa.table({"prompt": ["p"] * samples}), source)
    tree = {
        "input": {"path": str(source)},
        "output": {"url": str(folder / "out"), "samples_per_shard": SHARD},
    }
    plan = runner.plan_job(build(tree))
    ledger = Ledger(open_store(str(folder / "out")))
    ledger.freeze(plan, plan.spec)
    for shard in range(plan.shards):
        data = parquet_bytes(table_of(plan, shard))
        name = data_name(shard, plan.shards)
        ledger.store.put(name, data)
        count = plan.samples_of(shard)
        ledger.commit(
            Marker(
                shard=shard,
                counts=Counts(count, count, 0, 0),
                files=(Written(name, len(data), "0" * 64, count),),
                spec_fingerprint=plan.fingerprints.spec,
                plan_fingerprint=plan.fingerprint,
            )
        )
    return ledger


def table_of(plan: Plan, shard: int) -> pa.Table:
    first, stop = plan.sample_range(shard)
    drawn = np.random.default_rng(shard)
    count = stop - first
    images = [drawn.bytes(IMAGE) for _ in range(count)]
    return pa.table(
        {
            "key": [f"in-{number:08d}-v0" for number in range(first, stop)],
            "image": pa.array(
                [{"bytes": one, "path": "a.png"} for one in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "prompt": ["p"] * count,
            "label": [f"class {number}" for number in drawn.integers(0, 100, count)],
            "seed": drawn.integers(0, 2**62, count),
            "pixel_mean": drawn.uniform(0, 255, count).astype(np.float32),
            "pixel_std": drawn.uniform(0, 100, count).astype(np.float32),
        }
    )


def score(ledger: Ledger, samples: int) -> None:
    """Two score sets, as `batchgen score` makes them."""
    drawn = np.random.default_rng(1)
    keys = pa.array([f"in-{number:08d}-v0" for number in range(samples)])
    real = {name: drawn.uniform(0, 1, samples).astype(np.float32) for name in "abcd"}
    classes = [f"class {number}" for number in drawn.integers(0, 100, samples)]
    agrees = drawn.uniform(0, 1, samples) > 0.2
    values = [classes, agrees, real["a"], real["b"], real["c"]]
    named = {column.name: one for column, one in zip(CLASSIFIER, values, strict=True)}
    store_scores(ledger, "probe", pa.table({"key": keys, **named}), CLASSIFIER, "a")
    hashes = drawn.integers(0, 2**64, samples, np.uint64)
    looks = {
        "phash": hashes,
        "sharpness": real["d"],
        "is_blank": drawn.uniform(0, 1, samples) < 0.01,
    }
    store_scores(ledger, "looks", pa.table({"key": keys, **looks}), LOOKS, "b")


def run(url: str, words: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of one command, and what it has selected."""
    command = [sys.executable, "-m", "batchgen", "select", url, "--name", "one", "--json", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds = time.perf_counter() - began
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    selected = json.loads(done.stdout)["selected"]
    return {"seconds": round(seconds, 2), "peak_mib": max(before, most) // 1024, "kept": selected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/selection.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ledger = make(Path(folder), given.samples)
        score(ledger, given.samples)
        url = ledger.store.url
        found = {name: [run(url, words) for _ in range(3)] for name, words in QUERIES.items()}
    told = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "versions": {name: version(name) for name in ("duckdb", "pyarrow")},
        "load_average": round(os.getloadavg()[0], 1),  # of other programs too
        "samples": given.samples,
        "median_seconds": {
            name: statistics.median(one["seconds"] for one in runs) for name, runs in found.items()
        },
        "runs": found,
    }
    given.results.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
