"""A replica without further work ends while others still work, so that its node can be released."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from batchgen.engine.actors import Generate
from batchgen.engine.pools import Reservation
from batchgen.engine.stream import generate
from batchgen.output.ledger import Ledger, Marker
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


def test_replicas_end_while_the_last_shard_is_made(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_for(
        prompts(SHARDS * 2),
        tmp_path / "out",
        output__samples_per_shard=2,
        policy__shard_retries=0,
        resources__shards_in_flight=1,
    )
    ledger = Ledger(open_store(str(tmp_path / "out")))
    ledger.freeze(plan, plan.spec)
    events = list(generate(plan, ledger, range(SHARDS), [(LastOne, TWO)]))
    assert [type(event) for event in events] == [Marker] * SHARDS, events
