"""Measures scaling with the number of replicas, and how well `staged` pools find their sizes.

    python benchmarks/scaling.py replicas
    python benchmarks/scaling.py skewed

The replicas sleep; sleepers.py says how they differ from real ones.

``replicas``: 1 to 32 replicas, one process each. It measures how busy they are compared with a
single replica, in the middle half of the run (and in the complete run, which includes the start of
the processes).

``skewed``: encode, denoise and decode take 1 : 5 : 2 in the staged layout, on SLOTS CPUs that hold
one replica each. It compares the rate when the pools find their own sizes with the rate of the
best fixed sizes.

Each writes its case into ``results/scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.engine.pools import Pools, Reservation
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from benchmarks.sleepers import (
    Sleeper,
    SleepingDecode,
    SleepingDenoise,
    SleepingEncode,
    Slept,
    busy_share,
    logical_cpus,
    machine,
    run,
    sleeping_plan,
)

RESULTS = Path(__file__).parent / "results" / "scaling.json"
COUNTS = (1, 2, 4, 8, 16, 32)
SHARD_SECONDS, SHARDS_EACH = 2.0, 15
SLOTS = 16  # best divided as 2 : 10 : 4, since 2/1 = 10/5 = 4/2
STAGES = (SleepingEncode, SleepingDenoise, SleepingDecode)
BEST = (2, 10, 4)
SKEWED_SHARDS = 600


class OneAtATime(Sleeper):
    """Works on one shard at a time, like a device; the rows of the next one are already there."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        with self.lock:
            return super().work(frame, trial)


def made_a_second(slept: list[Slept]) -> float:
    """Shards per second, without the first and the last tenth of the shards."""
    ends = sorted(one.ended for one in slept)
    first, last = len(ends) // 10, 9 * len(ends) // 10
    return (last - first) / (ends[last] - ends[first])


def replicas() -> dict[str, Any]:
    found: dict[str, Any] = {"seconds_a_shard": SHARD_SECONDS, "shards_each": SHARDS_EACH}
    one = busy_one = None
    for count in COUNTS:
        share = Reservation(count, count, num_cpus=1, num_gpus=0, start_replicas=count)
        with (
            logical_cpus(count + 2),
            sleeping_plan(count * SHARDS_EACH, SHARD_SECONDS) as (plan, ledger),
        ):
            slept, took = run(plan, ledger, [(OneAtATime, share)])
        start = min(one_shard.began for one_shard in slept)
        whole = len(slept) / (max(one_shard.ended for one_shard in slept) - start)
        busy = busy_share(slept, count)
        one, busy_one = one or whole, busy_one or busy
        found[str(count)] = {
            "efficiency": round(busy / busy_one, 4),
            "efficiency_with_the_start": round(whole / (one * count), 4),
            "busy_in_the_middle": round(busy, 4),
            "shards_a_second_with_the_start": round(whole, 3),
            "seconds_with_start": round(took, 1),
        }
        print(count, found[str(count)], flush=True)
    return found


def skewed() -> dict[str, Any]:
    rates = {}
    for name, sizes in (("best", BEST), ("found", None)):
        with (
            logical_cpus(SLOTS + 1),
            sleeping_plan(SKEWED_SHARDS, 0, layout="staged") as (plan, ledger),
        ):
            slept, took = run(plan, ledger, pools(sizes))
        rates[name] = {
            "shards_a_second": round(made_a_second(slept), 3),
            "seconds_with_start": round(took, 1),
        }
        print(name, rates[name], flush=True)
    best = min(size / stage.seconds for size, stage in zip(BEST, STAGES, strict=True))
    ratio = rates["found"]["shards_a_second"] / rates["best"]["shards_a_second"]
    return {"slots": SLOTS, "possible_a_second": best, **rates, "share_of_best": round(ratio, 3)}


def pools(sizes: tuple[int, ...] | None) -> Pools:
    """Pools of fixed sizes; with None, pools that find their sizes by themselves."""
    if sizes is None:
        return [
            (stage, Reservation(1, SLOTS, num_cpus=1, num_gpus=0, start_replicas=1))
            for stage in STAGES
        ]
    return [
        (stage, Reservation(size, size, num_cpus=1, num_gpus=0, start_replicas=size))
        for size, stage in zip(sizes, STAGES, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=("replicas", "skewed"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = replicas() if options.case == "replicas" else skewed()
    print(json.dumps(found, indent=1))
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    command = f"python benchmarks/scaling.py {options.case}"
    known |= {**machine(), options.case: {"command": command, **found}}
    options.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
