"""Starts or joins Ray, waits until the pools fit, and watches the cluster during the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from batchgen.cluster.daemons import guarded
from batchgen.cluster.devices import refuse_hidden_gpu
from batchgen.cluster.join import cluster, refuse_unshared
from batchgen.engine.demand import await_room, watched
from batchgen.engine.pools import Pools, described, pools_of
from batchgen.output.ledger import PLAN, Ledger
from batchgen.plan.choices import SLOW_ON_GPU
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
    """The pools that generate ``shards`` shards, see ``started``."""

    def pools(nodes_may_join: bool) -> Pools:
        return pools_of(plan, shards, nodes_may_join)

    paths, what = _local_paths(plan, ledger), plan.model.model_id
    with started(plan, pools, paths, what, address, progress, interrupt) as found:
        if plan.spec.model.dtype == "float32" and any(one.num_gpus for _, one in found):
            progress.say(SLOW_ON_GPU)
        yield found


@contextmanager
def started(
    plan: Plan,
    pools: Callable[[bool], Pools],
    paths: Sequence[str],
    what: str,
    address: str | None,
    progress: Progress,
    interrupt: Callable[[str], None],
) -> Iterator[Pools]:
    """Starts Ray here, or joins the cluster at ``address``; yields the pools when they have room.

    Inside, ``interrupt`` is called if Ray or nodes that the pools need are lost.

    Args:
        plan: of the job.
        pools: returns the pools; is told whether nodes may join.
        paths: local files that every node must see.
        what: the replicas load, for the display.
        address: of the cluster.
        progress: the display.
        interrupt: called with what was lost.

    Raises:
        UsageError: a GPU cannot be used, the pools will never fit, or a node cannot see a folder.
    """
    progress.enter_phase(f"joining Ray at {address}" if address else "starting Ray")
    with cluster(address) as joined:
        refuse_hidden_gpu(plan.spec)
        await_room(pools(joined), joined, progress.say)
        found = pools(joined)  # again: nodes may have joined during the wait
        refuse_unshared(paths)
        progress.enter_phase(f"loading {what} on {described(found)}")
        with guarded(interrupt), watched(found, interrupt):
            yield found


def _local_paths(plan: Plan, ledger: Ledger) -> list[str]:
    """The paths of the output's plan and the first input file, where they are local files."""
    output = [ledger.store.path(PLAN)] if ledger.store.local else []
    return output + [file.path for file in plan.files[:1] if os.path.isabs(file.path)]
