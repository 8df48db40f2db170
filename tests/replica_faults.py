"""Replicas of arithmetic stages with injected faults, and jobs for them.

Ray's workers import this module, so it imports nothing that they do not need.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchgen.attempts import News
from batchgen.cluster.join import this_actor
from batchgen.engine import loading
from batchgen.engine.actors import Generate, StageActor
from batchgen.engine.listen import HEAR_EVERY_S
from batchgen.engine.pools import Reservation
from batchgen.engine.stream import generate
from batchgen.errors import RetryShard, StorageFailed
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker
from batchgen.plan.plan import Plan
from batchgen.records import EncodedBatch, ImageBatch, LatentBatch
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.stages.queue import Later
from batchgen.storage import open_store
from tests.arithmetic_stages import ArithmeticDecoder, ArithmeticDenoiser, arithmetic_stages
from tests.datasets_on_disk import plan_for

Events = dict[int, Marker | FailedMarker]
POOLS_SHARE = Reservation(min_replicas=1, max_replicas=1, num_cpus=0.5, num_gpus=0)
TWO = Reservation(2, 2, num_cpus=0.5, num_gpus=0, start_replicas=2)


class Faulty(Generate):
    """Arithmetic stages with injected faults: words in the prompt choose the fault."""

    def load(self) -> None:
        self.stages = arithmetic_stages()

    def work(self, frame: Frame, trial: Trial) -> Frame:
        words = " ".join(frames.to_rows(frame).table.column("prompt").to_pylist()).split()
        if "die" in words or ("die-once" in words and frame.attempt == 1):
            os._exit(1)
        if "raise" in words:
            raise ZeroDivisionError("a fault of the code")
        if "retry-once" in words and frame.attempt == 1:
            raise RetryShard("a fault that passes")
        if "stop" in words:
            raise StorageFailed("the bucket is gone")
        return super().work(frame, trial)


class Healed(Faulty):
    """The same without faults."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        return Generate.work(self, frame, trial)


class Slow(Faulty):
    """Slow stages: shards overlap in one actor long enough to be lost in the same crash."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        time.sleep(0.2)
        return super().work(frame, trial)


class LargeDecoder(ArithmeticDecoder):
    """Only one image at a time fits."""

    def start(self, batch: LatentBatch, batch_size: int | None = None) -> Later[ImageBatch]:
        if batch_size != 1:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return super().start(batch)


class LargeDenoiser(ArithmeticDenoiser):
    """It never fits."""

    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")


class ShortOfMemory(Faulty):
    def load(self) -> None:
        super().load()
        self.stages.decoder = LargeDecoder()  # type: ignore[assignment]


class FarTooSmall(Faulty):
    def load(self) -> None:
        super().load()
        self.stages.denoiser = LargeDenoiser()  # type: ignore[assignment]


class Unstartable(Faulty):
    def load(self) -> None:
        raise ImportError("no such kernel")


class BadNode(Slow):
    """The first of two replicas cannot load its model, as many times as the input says."""

    def load(self) -> None:
        loading.FIRST_PAUSE_S = loading.LOOK_EVERY_S = 0.1
        place = Path(self.plan.spec.output.url).with_suffix(".loads")
        place.mkdir(exist_ok=True)
        mine = place / this_actor()
        with suppress(FileExistsError):
            (place / "first").symlink_to(mine)
        tries = len(mine.read_text()) if mine.exists() else 0
        mine.write_text("x" * (tries + 1))
        first = os.readlink(place / "first") == str(mine)
        if first and tries < int(self.plan.spec.seed):
            raise OSError("no space left on this node")
        super().load()


class FallsIll(BadNode):
    """The first replica crashes during work and for a while cannot load its model again."""

    def load(self) -> None:
        if _deaths(self.plan):
            super().load()
        else:
            Slow.load(self)

    def work(self, frame: Frame, trial: Trial) -> Frame:
        if frame.shard == 0 and not _deaths(self.plan):
            Path(self.plan.spec.output.url).with_suffix(".died").mkdir()
            os._exit(1)
        return super().work(frame, trial)


class Drawing(Faulty):
    """A shard that takes a while after its only micro-batch."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        trial.made(1)
        time.sleep(2 * HEAR_EVERY_S)
        return super().work(frame, trial)


def _deaths(plan: Plan) -> bool:
    return Path(plan.spec.output.url).with_suffix(".died").exists()


def stream(
    plan: Plan,
    ledger: Ledger,
    actor: type[StageActor] = Faulty,
    share: Reservation = POOLS_SHARE,
    hear: Callable[[News], None] | None = None,
) -> Events:
    pending = ledger.states(plan).pending
    events = list(generate(plan, ledger, pending, [(actor, share)], hear))
    assert sorted(event.shard for event in events) == pending  # one event out per shard in
    return {event.shard: event for event in events}


def job(source: Path, output: Path, **settings: Any) -> tuple[Plan, Ledger]:
    """A frozen plan of one-row shards over arithmetic stages."""
    plan = plan_for(source, output, output__samples_per_shard=1, **settings)
    ledger = Ledger(open_store(str(output)))
    ledger.freeze(plan, plan.spec)
    return plan, ledger
