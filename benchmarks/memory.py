"""Measures whether an actor's memory grows: encodes far more unique prompts than its cache holds.

    python benchmarks/memory.py [--samples 60000] [--cache-mib 32] [--threads 2]
    python benchmarks/memory.py --ray

The shipped model encodes the prompts. Pixels are random; they are scored, encoded, written and
committed as in any run. The first command runs in this process, with as many shards at a time as
there are threads; the second runs in a real Ray Data actor. Each measures how fast resident memory
grows once the cache of prompts is full, and writes its case into ``results/memory.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen import models, runner
from batchgen.engine.actors import Generate
from batchgen.engine.pools import Reservation
from batchgen.engine.stream import generate
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.plan import Plan
from batchgen.records import EncodedBatch, ImageBatch, LatentBatch
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.stages import FusedStages
from batchgen.shard.work import Trial
from batchgen.spec.build import build
from batchgen.stages.queue import Later, Queue
from batchgen.storage import open_store
from benchmarks.sleepers import logical_cpus, machine

RESULTS = Path(__file__).parent / "results" / "memory.json"
CACHE, WHOLE = "MEMORY_BENCHMARK_CACHE_BYTES", "MEMORY_BENCHMARK_WHOLE"
EVERY = 1000  # samples between two measurements
WORDS = ("red", "green", "blue", "small", "large", "circle", "square", "digit", "seven", "on")


class Half:
    """A stage without a model: it accepts the encoder's results and returns noise."""

    def __init__(self) -> None:
        self.pipeline = type("Pipeline", (), {"components": {}})()


class Denoise(Half):
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        return LatentBatch(batch.call, batch.generator_states[:, :8].float(), batch.truncated)


class Decode(Half):
    def start(self, batch: LatentBatch) -> Later[ImageBatch]:
        count = len(batch.latents)
        shape = (count, batch.call.height, batch.call.width, 3)
        noise = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
        return Later(Queue().mark(), lambda: ImageBatch(noise, (True,) * count, batch.truncated))


class Metered(Generate):
    """Reports the actor's resident memory in each shard's marker."""

    def load(self) -> None:
        model, spec = self.plan.model, self.plan.spec
        encoder = models.load_encoder(model, spec, ["cpu"])
        encoder._cache_bytes = int(os.environ[CACHE])
        denoiser: Any = Denoise()
        decoder: Any = Decode()
        if os.environ.get(WHOLE):
            denoiser = models.load_denoiser(model, spec, ["cpu"])
            decoder = models.load_decoder(model, spec, ["cpu"])
        self.stages = FusedStages(encoder, denoiser, decoder)

    def work(self, frame: Frame, trial: Trial) -> Frame:
        rows = frames.to_rows(frame)
        marker = self.stages(rows, self.plan, self.ledger, frame.attempt, trial)
        marker = replace(marker, timings_s={"resident": psutil.Process().memory_info().rss})
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())


@contextmanager
def planned(samples: int) -> Iterator[tuple[Plan, Ledger]]:
    with tempfile.TemporaryDirectory(prefix="memory-", dir="/dev/shm") as folder:
        source = Path(folder) / "prompts.parquet"
        draw = np.random.default_rng(1)
        texts = [" ".join([*draw.choice(WORDS, 12), str(row)]) for row in range(samples)]
        pq.write_table(pa.table({"prompt": texts}), source, row_group_size=10_000)
        spec = build(
            {
                "input": {"path": str(source)},
                "output": {"url": f"{folder}/out"},
                "sampling": {"num_inference_steps": 1},
            }
        )
        plan = runner.plan_job(spec)
        ledger = Ledger(open_store(spec.output.url))
        ledger.freeze(plan, spec)
        yield plan, ledger


def in_process(samples: int, threads: int) -> list[tuple[int, float]]:
    """(samples done, resident bytes), with ``threads`` shards at a time."""
    points: list[tuple[int, float]] = []
    with planned(samples) as (plan, ledger), ThreadPoolExecutor(threads) as pool:
        actor = Metered.__new__(Metered)
        actor.plan, actor.ledger = plan, ledger
        actor.load()
        columns = read_columns(plan.spec, [name for name, _ in plan.columns])
        shards = (
            rows
            for span in make_spans(plan, range(plan.shards))
            for rows in read_span(span, plan.spec, columns)
        )
        waiting = []
        for number, rows in enumerate(shards):
            waiting.append(pool.submit(actor.stages, rows, plan, ledger, 1))
            if len(waiting) == threads:
                waiting.pop(0).result()
            note(points, (number + 1) * 64, psutil.Process().memory_info().rss)
    return points


def note(points: list[tuple[int, float]], done: int, resident: float) -> None:
    if not points or done - points[-1][0] >= EVERY:
        points.append((done, resident))


def in_ray(samples: int) -> list[tuple[int, float]]:
    """(samples done, resident bytes of the only actor)."""
    share = Reservation(1, 1, num_cpus=1, num_gpus=0, start_replicas=1)
    points: list[tuple[int, float]] = []
    with logical_cpus(2), planned(samples) as (plan, ledger):
        for number, event in enumerate(
            generate(plan, ledger, range(plan.shards), [(Metered, share)])
        ):
            assert isinstance(event, Marker), event
            note(points, (number + 1) * 64, event.timings_s["resident"])
    return points


def slope(points: list[tuple[int, float]], first: int) -> float:
    """MB per 10,000 samples, by least squares over the points after ``first`` samples."""
    late = [point for point in points if point[0] >= first]
    return statistics.linear_regression(*zip(*late, strict=True)).slope * 10_000 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--cache-mib", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--whole", action="store_true", help="also denoise (one step) and decode")
    parser.add_argument("--case", help="name of the case in the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ[CACHE] = str(options.cache_mib << 20)
    os.environ[WHOLE] = "1" if options.whole else ""
    torch.set_num_threads(1)
    began = time.monotonic()
    points = (
        in_ray(options.samples) if options.ray else in_process(options.samples, options.threads)
    )
    full = options.cache_mib * 48 + 3000  # a prompt of the shipped model takes 22 kB
    found: dict[str, Any] = {
        "samples": options.samples,
        "seconds": round(time.monotonic() - began),
        "cache_mib": options.cache_mib,
        "mb_a_10000_samples": round(slope(points, full), 2),
        "mb_a_10000_samples_in_the_last_third": round(slope(points, points[-1][0] * 2 // 3), 2),
        "points_mb": [
            [done, round(size / 1e6)] for done, size in points[:: max(1, len(points) // 15)]
        ],
    }
    print(json.dumps(found))
    name = options.case or ("ray" if options.ray else f"in-process-{options.threads}-threads")
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    known |= {**machine(), name: {"command": "python " + " ".join(sys.argv), **found}}
    options.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
