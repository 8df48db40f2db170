"""Measures the driver of a job with a million rows: its memory, and how soon a resume generates.

    python benchmarks/million.py [--rows 1000000] [--left 0.01] [--work FOLDER]

A first job of 64 rows makes real images. Then the replicas of a job of ``--rows`` rows write the
images of the first one as those of every shard, and compute nothing; all else is the real run: the
plan, Ray, readers, shards on a local disk, markers, counts, the report. The driver's memory is
compared after a tenth of the rows and at the end: its own memory, without the pages of Ray's object
store, which all processes share and whose size is fixed. Then the markers of the last ``--left``
of the shards are removed, and a resume is timed from Ray's start to the first new shard.

Writes ``results/million.json``. A million rows need 3 GB and some minutes; ``--work`` names the
folder for them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen import runner
from batchgen.engine import start
from batchgen.engine.actors import Generate
from batchgen.engine.pools import Pools, Reservation
from batchgen.output.commit import commit_shard
from batchgen.output.ledger import Ledger
from batchgen.output.marker import parse_marker
from batchgen.output.outcome import Outcome
from batchgen.plan.plan import Plan
from batchgen.progress.display import Progress
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from benchmarks.sleepers import machine

RESULTS = Path(__file__).parent / "results" / "million.json"
SHARD = 64
REPLICAS = 2


class Copying(Generate):
    """Writes the images of the first job as those of every shard."""

    def load(self) -> None:
        first = Path(self.plan.spec.output.url).with_name("first")
        (data,) = (first / "data").iterdir()
        (marker,) = (first / "_batchgen" / "shards").iterdir()
        self.table = pq.read_table(data)
        self.marker = parse_marker(marker.read_bytes())

    def work(self, frame: Frame, trial: Trial) -> Frame:
        plan = self.plan
        marker = replace(
            self.marker,
            shard=frame.shard,
            attempt=frame.attempt,
            spec_fingerprint=plan.fingerprints.spec,
            plan_fingerprint=plan.fingerprint,
            environment={**self.marker.environment, "began": str(time.time())},
        )
        made = commit_shard(self.ledger, plan, marker, self.table, None)
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, made.to_json())


def spec_for(folder: Path, name: str, rows: int) -> Spec:
    source = folder / f"{name}.parquet"
    prompts = pa.table({"prompt": [f"a photograph of object number {n}" for n in range(rows)]})
    pq.write_table(prompts, source, row_group_size=10_000)
    output = {"url": str(folder / name), "samples_per_shard": SHARD}
    return build({"input": {"path": str(source)}, "output": output})


class Watch:
    """What the driver tells and needs while it runs: its phases, shards and memory."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.phases: list[tuple[str, float]] = []
        self.first: float | None = None  # when a replica began with the first shard
        self.rows = 0
        self.bytes_at: dict[int, int] = {}

    def counted(self, event: Any) -> None:
        self.rows += SHARD
        if self.first is None:
            self.first = float(event.environment["began"])
        if self.rows // self.step != (self.rows - SHARD) // self.step:
            self.bytes_at[self.rows] = psutil.Process().memory_full_info().uss

    def since_ray(self) -> float:
        """Seconds from the start of the pools, with Ray running, to the first shard."""
        (loading,) = (when for text, when in self.phases if text.startswith("loading "))
        assert self.first is not None
        return round(self.first - loading, 2)


@contextmanager
def watched(step: int) -> Iterator[Watch]:
    """Replicas that copy instead of those that generate, and a record of what the driver does."""
    watch, count, enter = Watch(step), runner.count, Progress.enter_phase
    pools: Pools = [(Copying, Reservation(REPLICAS, REPLICAS, 0.5, 0, start_replicas=REPLICAS))]

    def counted(tally: Any, event: Any, made: bool = False) -> None:
        count(tally, event, made)
        watch.counted(event)

    def entered(progress: Progress, text: str) -> None:
        watch.phases.append((text, time.time()))
        enter(progress, text)

    before = start.pools_of
    start.pools_of = lambda *_: pools
    runner.count = counted
    Progress.enter_phase = entered  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        start.pools_of, runner.count = before, count
        Progress.enter_phase = enter  # type: ignore[method-assign]


def whole(spec: Spec, rows: int) -> tuple[dict[str, Any], Outcome]:
    with watched(rows // 10) as watch:
        outcome = runner.run(spec, quiet=True)
    points = sorted(watch.bytes_at.items())
    (few, low), (many, high) = points[0], points[-1]
    return {
        "rows": watch.rows,
        "seconds": round(outcome.seconds, 1),
        "driver_own_mib": {rows: round(size / 2**20, 1) for rows, size in points},
        "driver_bytes_a_row": round((high - low) / (many - few), 1),
    }, outcome


def resumed(output: Path, left: float) -> dict[str, Any]:
    ledger = Ledger(open_store(str(output)))
    plan: Plan = ledger.require_plan()
    removed = range(int(plan.shards * (1 - left)), plan.shards)
    for shard in removed:
        ledger.withdraw(shard)
    began = time.time()
    with watched(plan.samples) as watch:
        outcome = runner.resume(str(output), quiet=True)
    (started,) = (when for text, when in watch.phases if text == "starting Ray")
    assert outcome.pending == 0 and watch.rows == len(removed) * SHARD
    return {
        "shards_left": len(removed),
        "seconds_before_ray": round(started - began, 2),
        "seconds_from_ray_to_the_first_shard": watch.since_ray(),
        "seconds": round(time.time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--left", type=float, default=0.01)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="million-", dir=given.work) as name:
        folder = Path(name)
        assert runner.run(spec_for(folder, "first", SHARD), quiet=True).exit_code == 0
        found, outcome = whole(spec_for(folder, "many", given.rows), given.rows)
        assert outcome.pending == 0, outcome.message
        print(json.dumps(found, indent=1), flush=True)
        found = {"run": found, "resume": resumed(folder / "many", given.left)}
    print(json.dumps(found["resume"], indent=1))
    facts = {**machine(), "command": "python " + " ".join(sys.argv), **found}
    given.results.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
