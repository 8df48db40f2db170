"""A replica ends when no work is left for it, so that its node can be released; not before."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from batchgen.engine.actors import Generate
from batchgen.engine.pools import Pools, Reservation
from batchgen.engine.stream import generate
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.storage import open_store
from tests.arithmetic_stages import arithmetic_stages
from tests.cluster.nodes import until
from tests.datasets_on_disk import plan_for

pytestmark = pytest.mark.usefixtures("ray_session")
TWO = Reservation(min_replicas=1, max_replicas=2, start_replicas=2, num_cpus=0.5, num_gpus=0)
SHARDS = 4
ENDS_WITHIN_S = 60
COMMITTED_WITHIN_S = 240
SHRINKS_WITHIN_S = 15  # Ray Data waits 10 s before it makes a pool smaller


class LastOne(Generate):
    """Works on the last shard only when it is the only replica left."""

    def load(self) -> None:
        self.stages = arithmetic_stages()
        self.pids = Path(self.plan.spec.output.url).parent / "pids"
        self.pids.mkdir(exist_ok=True)
        (self.pids / str(os.getpid())).touch()

    def work(self, frame: Frame, trial: Trial) -> Frame:
        if frame.shard == SHARDS - 1:
            until("there are two", lambda: len(list(self.pids.iterdir())) == 2)
            others = {int(one.name) for one in self.pids.iterdir()} - {os.getpid()}
            for pid in others & set(psutil.pids()):
                psutil.Process(pid).wait(ENDS_WITHIN_S)
        return super().work(frame, trial)


def make_all(source: Path, output: Path, pools: Pools) -> None:
    """Run the pools on SHARDS shards; each must be made at the first attempt."""
    plan = plan_for(
        source,
        output,
        output__samples_per_shard=2,
        policy__shard_retries=0,
        resources__shards_in_flight=1,
    )
    ledger = Ledger(open_store(str(output)))
    ledger.freeze(plan, plan.spec)
    events = list(generate(plan, ledger, range(SHARDS), pools))
    assert [type(event) for event in events] == [Marker] * SHARDS, events


def test_replicas_end_while_the_last_shard_is_made(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    make_all(prompts(SHARDS * 2), tmp_path / "out", [(LastOne, TWO)])


class OneByOne(Generate):
    """The first pool: hands on a shard when the one before it is committed."""

    def load(self) -> None:
        pass

    def work(self, frame: Frame, trial: Trial) -> Frame:
        if frame.shard:
            before = frame.shard - 1
            ends = "the one before ends"  # after the start of both replicas, and its wait
            until(ends, lambda: self.ledger.committed(self.plan, before), COMMITTED_WITHIN_S)
        return frame


class Watching(LastOne):
    """The second pool, hardly used; the first shard waits for the other replica's end."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        if frame.shard == 0:
            until("there are two", lambda: len(list(self.pids.iterdir())) == 2)
            (other,) = {int(one.name) for one in self.pids.iterdir()} - {os.getpid()}
            with suppress(psutil.TimeoutExpired):
                psutil.Process(other).wait(SHRINKS_WITHIN_S)
                (self.pids.parent / "ended").touch()
        return Generate.work(self, frame, trial)


def test_a_pool_keeps_its_replicas_while_shards_come_slowly(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    """Ray Data makes pools smaller that are hardly used, as each is when its first shard comes."""
    one = Reservation(min_replicas=1, max_replicas=1, num_cpus=0.1, num_gpus=0)
    make_all(prompts(SHARDS * 2), tmp_path / "out", [(OneByOne, one), (Watching, TWO)])
    assert not (tmp_path / "ended").exists()


class Threads(LastOne):
    """Writes the names of the replica's threads."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        names = [one.name for one in threading.enumerate()]
        (self.pids.parent / "threads").write_text("\n".join(names))
        return Generate.work(self, frame, trial)


def test_ray_data_does_not_measure_memory_beside_the_stages(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    make_all(prompts(SHARDS * 2), tmp_path / "out", [(Threads, TWO)])
    names = (tmp_path / "threads").read_text()
    assert "MainThread" in names
    assert "poll_uss" not in names
