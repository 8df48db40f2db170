"""Takes the start of a job apart: the command, the plan, Ray, the libraries, the weights.

    python benchmarks/start_up.py [--rounds 3] [--images 64]

Each part runs in a process of its own, in turns, on the shipped model:

- ``command``: Python's start and the imports of the command line (`batchgen tasks`).
- ``plan``: `batchgen plan`, which contains the former.
- ``ray_start``, ``ray_end``: a run's own Ray, without a job.
- ``libraries``: the imports of torch, diffusers and transformers, as a replica does them.
- ``weights``: the three stages of a replica after that.
- ``job``: `batchgen run`, and of it ``start_up`` until the first replica generates.

The parts do not add up to ``start_up``, since some of them overlap on several cores. Writes
``results/start_up.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sleepers import machine

RESULTS = Path(__file__).parent / "results" / "start_up.json"
RAY = """
import json, time
from batchgen.cluster.join import cluster
began = time.perf_counter()
with cluster(None):
    up = time.perf_counter()
print(json.dumps({"ray_start": up - began, "ray_end": time.perf_counter() - up}))
"""
REPLICA = """
import json, sys, time
from batchgen import models, runner
from batchgen.models import libraries
from batchgen.spec.build import build
plan = runner.plan_job(build({"input": sys.argv[1], "output": sys.argv[2]}))
began = time.perf_counter()
libraries.prepare(1)
imported = time.perf_counter()
for load in (models.load_encoder, models.load_denoiser, models.load_decoder):
    load(plan.model, plan.spec)
ready = time.perf_counter()
print(json.dumps({"libraries": imported - began, "weights": ready - imported}))
"""
Times = dict[str, float]


def told(*words: str) -> Times:
    """The JSON on the last line that a new Python process prints."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    found: Times = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(name: str, *words: str) -> Times:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "batchgen", *words], capture_output=True, check=True)
    return {name: time.perf_counter() - began}


def job(source: str, output: str) -> Times:
    began = time.perf_counter()
    words = ("-m", "batchgen", "run", "--input", source, "--output", output, "--json")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return {
        "job": time.perf_counter() - began,
        "start_up": json.loads(done.stdout)["start_up_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder:
        source = f"{folder}/prompts.parquet"
        prompts = [f"a red circle {number}" for number in range(given.images)]
        pq.write_table(pa.table({"prompt": prompts}), source)
        words = ("--input", source, "--output")
        parts: tuple[Callable[[str], Times], ...] = (
            lambda output: timed("command", "tasks"),
            lambda output: timed("plan", "plan", *words, output),
            lambda output: told("-c", RAY),
            lambda output: told("-c", REPLICA, source, output),
            lambda output: job(source, output),
        )
        for number in range(given.rounds):
            for part in parts:
                for name, seconds in part(f"{folder}/out-{number}").items():
                    seen.setdefault(name, []).append(round(seconds, 2))
    medians = {name: statistics.median(each) for name, each in seen.items()}
    print(json.dumps(medians, indent=1))
    facts = {**machine(), "command": "python " + " ".join(sys.argv)}
    facts |= {"images": given.images, "seconds": medians, "rounds": seen}
    given.results.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
