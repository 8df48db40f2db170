"""Compares jobs of batchgen with the bare stages and with what users write without it, on the CPU.

    python benchmarks/rivals.py [--images 1536] [--rounds 3] [--batch 16] [--sides fused,bare,...]

Every side makes the same images with the shipped model (text-to-image, 12 steps, guidance 2) as
PNG, in processes of its own. The sides take turns, and each round runs all of them. A rate counts
from the moment at which the first process has loaded its model: imports, Ray's start and the
weights are left out, the last images of the slower process are not.

- ``fused``, ``staged``: `batchgen run`, with Parquet, markers, report and all.
- ``bare``: as many processes as ``fused`` has replicas; each runs batchgen's stages in a loop and
  encodes every image, without Ray, reading, scoring or storage.
- ``loop``: plain diffusers, one process, one thread, batches, PNGs saved in the loop.
- ``loop_default_threads``: the same with torch's own number of threads.
- ``one_by_one``: the same with one image a call.
- ``ray_arrays``: the pattern of Ray's own Stable Diffusion test: float arrays of one actor pool
  through the object store to tasks that save them.
- ``ray_parquet``: `read_parquet`, `map_batches` to PNG bytes, `write_parquet`.

Sides that are slow make fewer images. Writes ``results/rivals.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rival_sides import SIDES, Task, write_prompts

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rivals.json"
SLOW = {"one_by_one": 0.125, "loop_default_threads": 0.25, "loop": 0.5}  # part of the images
OURS = ("fused", "staged")
ASKED = {  # our rate over theirs, at least
    "fused": {"bare": 0.95, "loop": 1.9, "loop_default_threads": 4, "one_by_one": 10}
    | {"ray_arrays": 1.7, "ray_parquet": 1.7},
    "staged": {"bare": 0.85},
}


def run_side(name: str, task: Task) -> float:
    """Images a second of one side, which runs in a process of its own."""
    words = [sys.executable, str(HERE / "rival_sides.py"), name, json.dumps(task.facts())]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "RAY_DEDUP_LOGS": "1"}
    if name not in ("loop_default_threads", "one_by_one"):
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["images"] == task.images, (name, found)
    return round(found["images"] / found["seconds"], 2)


def ratios(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median over the rounds of our rate over theirs, both of the same round."""
    return {
        ours: {
            theirs: round(
                statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True)), 3
            )
            for theirs in rates
            if theirs != ours
        }
        for ours in OURS
        if ours in rates
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    sides: dict[str, Callable[..., Any]] = {name: SIDES[name] for name in given.sides.split(",")}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for name in sides:
                images = max(given.batch, int(given.images * SLOW.get(name, 1)))
                place = Path(folder) / f"{name}-{number}"
                place.mkdir()
                task = Task(str(place), images, given.batch, given.processes)
                write_prompts(task)
                rates[name].append(run_side(name, task))
                print(f"round {number + 1}: {name} {rates[name][-1]} images/s", flush=True)
    found = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "ray")},
        "images": given.images,
        "batch_size": given.batch,
        "processes": given.processes,
        "images_a_second": rates,
        "ratios": ratios(rates),
        "asked": ASKED,
    }
    given.results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["ratios"], indent=1))


if __name__ == "__main__":
    main()
