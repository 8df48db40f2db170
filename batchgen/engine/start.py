"""From a plan to pools that have room: Ray is started or joined, and watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchgen.cluster.daemons import guarded
from batchgen.cluster.devices import refuse_hidden_gpu
from batchgen.cluster.join import cluster, refuse_unshared
from batchgen.engine.demand import await_room, watched
from batchgen.engine.pools import Pools, described, pools_of
from batchgen.output.ledger import PLAN, Ledger
from batchgen.plan.plan import Plan
from batchgen.progress.display import Progress


@contextmanager
def ready(
    plan: Plan,
    ledger: Ledger,
    shards: int,
    address: str | None,
    progress: Progress,
    interrupt: Callable[[str], None],
) -> Iterator[Pools]:
    """Ray on this machine, or the cluster at ``address``; yields the pools for so many shards.

    Inside, ``interrupt`` is called if Ray or the room that the pools need is lost.

    Raises:
        UsageError: a GPU cannot be used, there will never be room, or a node does not see a folder.
    """
    progress.enter_phase(f"joining Ray at {address}" if address else "starting Ray")
    with cluster(address) as joined:
        refuse_hidden_gpu(plan.spec)
        await_room(pools_of(plan, shards), joined, progress.say)
        pools = pools_of(plan, shards)  # with what has come meanwhile
        refuse_unshared(_local_paths(plan, ledger))
        progress.enter_phase(f"loading {plan.model.model_id} on {described(pools)}")
        with guarded(interrupt), watched(pools, interrupt):
            yield pools


def _local_paths(plan: Plan, ledger: Ledger) -> list[str]:
    """Of the input and the output, those that are files of a machine."""
    output = [ledger.store.path(PLAN)] if ledger.store.local else []
    return output + [file.path for file in plan.files[:1] if os.path.isabs(file.path)]
