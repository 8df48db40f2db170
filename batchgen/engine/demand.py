"""Waits until the cluster can fit the smallest pools; fails with a clear message if it never will.

A watchdog checks the same during the run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

from batchgen.cluster.join import nodes_that_stay
from batchgen.engine.pools import Amounts, Pools, Reservation, lacking
from batchgen.errors import UsageError
from batchgen.watchdog import watchdog

MET_WITHIN_S = 45.0  # time for nodes to join, or for an autoscaler to begin starting some
NODES_WITHIN_S = 900.0  # time limit once an autoscaler starts nodes: machines take minutes
GONE_FOR_S = 60.0
LOOK_EVERY_S = 2.0
COUNTED = ("CPU", "GPU")


def await_room(pools: Pools, joined: bool, say: Callable[[str], None]) -> None:
    """Wait until the smallest pools fit; requests the nodes from an autoscaler if there is one.

    Args:
        pools: the pools that must fit.
        joined: this process joined a cluster, so that nodes may still be added.
        say: called once with what the run waits for.

    Raises:
        UsageError: the pools will never fit; says what they need and what the cluster has.
    """
    if (lack := lacking(pools, nodes_that_stay())) is None:
        return
    if not joined:
        raise UsageError(_never(*lack))
    request_resources(bundles=[_whole(s) for _, s in pools for _ in range(s.min_replicas)])
    say(f"waiting for nodes: {_asked(*lack)}; the cluster has {_has()}")
    began, coming = time.monotonic(), False
    while (lack := lacking(pools, nodes_that_stay())) is not None:
        coming = coming or _coming()
        if time.monotonic() - began > (NODES_WITHIN_S if coming else MET_WITHIN_S):
            raise UsageError(_never(*lack))
        time.sleep(LOOK_EVERY_S)
    request_resources(bundles=[])  # from here on the replicas themselves request resources


@contextmanager
def watched(pools: Pools, interrupt: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``interrupt`` is called once if nodes are lost without which a pool cannot run."""
    since: float | None = None

    def look() -> bool:
        nonlocal since
        lack = _lacking_for_good(pools)
        if lack is None:
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > GONE_FOR_S:
            interrupt(f"nodes were lost and not replaced: {_never(*lack)}")
            return True
        return False

    with watchdog("demand", look, LOOK_EVERY_S, wait_s=LOOK_EVERY_S):
        yield


def _lacking_for_good(pools: Pools) -> tuple[str, Reservation] | None:
    """A pool that does not fit while no node is being started; None if the head is silent."""
    try:
        lack = lacking(pools, nodes_that_stay())
        return None if lack is None or _coming() else lack
    except (ray.exceptions.RayError, RuntimeError, OSError):
        return None


def _coming() -> bool:
    """Whether an autoscaler, of either version, is starting nodes."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    if status.pending_launches or status.pending_nodes:
        return True
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    nodes = report.get("autoscaler_report", {})
    return bool(nodes.get("pending_launches") or nodes.get("pending_nodes"))


def _whole(reservation: Reservation) -> dict[str, int]:
    """A replica's demand in whole numbers, as ``request_resources`` needs it."""
    return {name: max(1, round(amount)) for name, amount in reservation.demand.items()}


def _never(pool: str, reservation: Reservation) -> str:
    fields = "num_cpus, num_gpus, accelerator_type, resources or min_replicas"
    return (
        f"{_asked(pool, reservation)}; the cluster has {_has()}; change {fields} in "
        f"resources.{pool}, or add such nodes"
    )


def _asked(pool: str, reservation: Reservation) -> str:
    least = reservation.min_replicas
    many = "a replica" if least == 1 else f"each of {least} replicas"
    return f"{many} of the {pool} pool needs a node with {_listed(reservation.demand)} free"


def _has() -> str:
    kinds = Counter(_listed(node) for node in nodes_that_stay())
    return ", ".join(
        f"{count} node{'s' if count > 1 else ''} of {kind}" for kind, count in kinds.most_common(5)
    )


def _listed(resources: Amounts) -> str:
    """Resources for a message, without node addresses: ``4 CPU, 1 GPU, L40S``."""
    said = [f"{resources.get(name, 0.0):g} {name}" for name in COUNTED]
    for name, amount in sorted(resources.items()):
        if name.startswith("accelerator_type:"):
            said.append(name.partition(":")[2])
        elif name not in (*COUNTED, "memory", "object_store_memory") and ":" not in name:
            said.append(f"{amount:g} {name}")
    return ", ".join(said)
