"""Replicas that sleep instead of computing, to measure only the dispatch of shards.

They are actors of the real engine (`batchgen.engine.stream.generate`) with the real reader, frames
and record of attempts. They differ from real ones in three ways: a replica is a thread of an actor,
not a process, so that a thousand fit on one machine; a shard has one row; and nothing is written
except the marker that the driver reads.
"""

from __future__ import annotations

import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from batchgen import runner
from batchgen.cluster.join import cluster
from batchgen.engine.actors import Decode, Denoise, Encode, Generate
from batchgen.engine.pools import Pools
from batchgen.engine.stream import generate
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Counts, Marker
from batchgen.plan.plan import Plan
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.spec.build import build
from batchgen.storage import open_store


@dataclass(frozen=True)
class Slept:
    """One shard on one replica: when it began and ended, in seconds since the epoch."""

    replica: str
    began: float
    ended: float


class Sleeper(Generate):
    """Sleeps `sampling.num_inference_steps` milliseconds for each shard."""

    def load(self) -> None:
        self.lock = threading.Lock()  # of the device
        self.seconds = (self.plan.spec.sampling.num_inference_steps or 0) / 1000

    def work(self, frame: Frame, trial: Trial) -> Frame:
        began = time.time()
        time.sleep(self.seconds)
        return ended(frame, began)


def ended(frame: Frame, began: float) -> Frame:
    replica = f"{ray.get_runtime_context().get_worker_id()}-{threading.get_ident()}"
    marker = Marker(
        shard=frame.shard,
        counts=Counts(1, 1, 0, 0),
        files=(),
        reasons={},
        truncated_prompts=0,
        timings_s={"began": began, "ended": time.time()},
        read_bytes=0,
        batch_size=1,
        micro_batches=1,
        parameter_counts={},
        attempt=frame.attempt,
        environment={"replica": replica},
        spec_fingerprint="",
        finished_at=time.time(),
    )
    return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())


class SleepingEncode(Encode):
    seconds = 0.2

    def load(self) -> None:
        self.lock = threading.Lock()  # of the device

    def work(self, frame: Frame, trial: Trial) -> Frame:
        with self.lock:
            time.sleep(self.seconds)
        return replace(frame, state=frames.ENCODED)


class SleepingDenoise(Denoise):
    seconds = 1.0

    def load(self) -> None:
        self.lock = threading.Lock()  # of the device

    def work(self, frame: Frame, trial: Trial) -> Frame:
        with self.lock:
            time.sleep(self.seconds)
        return replace(frame, state=frames.DENOISED)


class SleepingDecode(Decode):
    seconds = 0.4

    def load(self) -> None:
        self.lock = threading.Lock()  # of the device

    def work(self, frame: Frame, trial: Trial) -> Frame:
        with self.lock:
            began = time.time()
            time.sleep(self.seconds)
        return ended(frame, began)


@contextmanager
def sleeping_plan(
    shards: int, seconds: float, in_flight: int = 2, **resources: Any
) -> Iterator[tuple[Plan, Ledger]]:
    """A frozen plan of ``shards`` shards with one row each; ``in_flight`` at a time in an actor."""
    with tempfile.TemporaryDirectory(prefix="sleepers-") as folder:
        source = Path(folder) / "prompts.parquet"
        prompts = pa.table({"prompt": [f"prompt {row}" for row in range(shards)]})
        pq.write_table(prompts, source, row_group_size=1000)
        spec = build(
            {
                "input": {"path": str(source)},
                "output": {"url": f"{folder}/out", "samples_per_shard": 1},
                "resources": resources,
            }
        )
        plan = runner.plan_job(spec)
        ledger = Ledger(open_store(spec.output.url))
        ledger.freeze(plan, spec)
        steps = plan.spec.sampling.model_copy(update={"num_inference_steps": round(seconds * 1000)})
        layout = plan.spec.resources.model_copy(update={"shards_in_flight": in_flight})
        changed = plan.spec.model_copy(update={"sampling": steps, "resources": layout})
        yield replace(plan, spec=changed), ledger


@contextmanager
def logical_cpus(count: int) -> Iterator[None]:
    """Ray on this machine with ``count`` CPUs, real or not: sleeping replicas need none."""
    ray.init(
        address="local",
        num_cpus=count,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=1 << 30,
    )
    try:
        with cluster(None):
            yield
    finally:
        ray.shutdown()


def run(
    plan: Plan, ledger: Ledger, pools: Pools, watch: list[tuple[int, float]] | None = None
) -> tuple[list[Slept], float]:
    """Stream all shards; returns when each began and ended, and the total seconds.

    ``watch`` receives (shards done, resident bytes of this process) once a second.
    """
    slept, me, looked = [], psutil.Process(), 0.0
    began = time.monotonic()
    for event in generate(plan, ledger, range(plan.shards), pools):
        assert isinstance(event, Marker), event
        times = event.timings_s
        slept.append(Slept(event.environment["replica"], times["began"], times["ended"]))
        if watch is not None and time.monotonic() - looked >= 1:
            looked = time.monotonic()
            watch.append((len(slept), me.memory_info().rss))
    assert len(slept) == plan.shards
    return slept, time.monotonic() - began


def busy_share(
    slept: Sequence[Slept], replicas: int, first: float = 0.25, last: float = 0.75
) -> float:
    """The fraction of time that the replicas worked, between these fractions of the run."""
    start = min(one.began for one in slept)
    span = max(one.ended for one in slept) - start
    low, high = start + first * span, start + last * span
    inside = sum(max(0.0, min(one.ended, high) - max(one.began, low)) for one in slept)
    return inside / (replicas * (high - low))


def gaps(slept: Sequence[Slept]) -> list[float]:
    """Seconds between the end of a shard on a replica and the start of its next one, sorted."""
    by_replica: dict[str, list[Slept]] = {}
    for one in slept:
        by_replica.setdefault(one.replica, []).append(one)
    found = []
    for several in by_replica.values():
        several.sort(key=lambda one: one.began)
        found += [b.began - a.ended for a, b in pairwise(several)]
    return sorted(found)


def machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, no GPU, Python "
        f"{platform.python_version()}",
        "versions": {"ray": ray.__version__},
    }
