"""Measures the dispatch of shards to a thousand replicas: its rate, and the driver's memory.

    python benchmarks/dispatch.py [--replicas 1000] [--seconds 30] [--shards-each 8]
    python benchmarks/dispatch.py --rate --shards 20000

The replicas sleep; sleepers.py says how they differ from real ones. The first command measures how
busy they are in the middle half of the run, and the gap between two shards on one replica. The
second uses shards that take no time: it measures how many shards a second the driver can dispatch
at most, and how its memory grows. Each writes its case into ``results/dispatch.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.engine.pools import Reservation
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from benchmarks.sleepers import (
    Sleeper,
    busy_share,
    ended,
    gaps,
    logical_cpus,
    machine,
    run,
    sleeping_plan,
)

RESULTS = Path(__file__).parent / "results" / "dispatch.json"
THREADS = 50  # replicas of one actor process
GOLDEN = 0.6180339887498949  # its multiples spread evenly between whole numbers


class Uneven(Sleeper):
    """Shards take from 3/4 to 5/4 of the time, so that replicas do not all finish together."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        began = time.time()
        time.sleep(self.seconds * (0.75 + 0.5 * (frame.shard * GOLDEN % 1)))
        return ended(frame, began)


def slope(points: list[tuple[int, float]]) -> float:
    """Slope of the second half of the points, by least squares."""
    half = points[len(points) // 2 :]
    if len(half) < 2:
        return float("nan")
    return statistics.linear_regression(*zip(*half, strict=True)).slope


def busy(replicas: int, seconds: float, shards_each: int) -> dict[str, Any]:
    actors = -(-replicas // THREADS)
    share = Reservation(actors, actors, num_cpus=1, num_gpus=0, start_replicas=actors)
    shards = replicas * shards_each
    memory: list[tuple[int, float]] = []
    with (
        logical_cpus(actors + 2),
        sleeping_plan(shards, seconds, in_flight=min(replicas, THREADS)) as (plan, ledger),
    ):
        slept, took = run(plan, ledger, [(Uneven, share)], memory)
    between = gaps(slept)
    return {
        "replicas": replicas,
        "seconds_a_shard": seconds,
        "shards": shards,
        "seconds": round(took, 1),
        "busy_in_the_middle": round(busy_share(slept, replicas), 4),
        "gap_median_ms": round(1000 * statistics.median(between), 1),
        "gap_99th_ms": round(1000 * between[int(0.99 * len(between))], 1),
        "driver_mib_first_and_last": [round(memory[0][1] / 2**20), round(memory[-1][1] / 2**20)],
        "driver_kb_a_shard": round(slope(memory) / 1000, 2),
    }


def rate(shards: int) -> dict[str, Any]:
    share = Reservation(2, 2, num_cpus=1, num_gpus=0, start_replicas=2)
    memory: list[tuple[int, float]] = []
    with logical_cpus(4), sleeping_plan(shards, 0, in_flight=8) as (plan, ledger):
        slept, took = run(plan, ledger, [(Sleeper, share)], memory)
    first, last = slept[len(slept) // 4], slept[3 * len(slept) // 4]
    return {
        "shards": shards,
        "seconds": round(took, 1),
        "shards_a_second": round(len(slept) / 2 / (last.ended - first.ended), 1),
        "driver_mib_first_and_last": [round(memory[0][1] / 2**20), round(memory[-1][1] / 2**20)],
        "driver_kb_a_shard": round(slope(memory) / 1000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--shards-each", type=int, default=8)
    parser.add_argument("--rate", action="store_true")
    parser.add_argument("--shards", type=int, default=20000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rate:
        name, found = "rate", rate(options.shards)
    else:
        name, found = "busy", busy(options.replicas, options.seconds, options.shards_each)
    print(json.dumps(found, indent=1))
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    known |= {**machine(), name: {"command": "python " + " ".join(sys.argv), **found}}
    options.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
