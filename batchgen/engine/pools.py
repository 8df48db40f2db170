"""Decides how many replicas each pool has and what each of them reserves of the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray

from batchgen.cluster.join import nodes_that_stay
from batchgen.engine.actors import Decode, Denoise, Encode, Generate, StageActor
from batchgen.engine.batch_size import SHARES
from batchgen.plan.plan import Plan
from batchgen.spec.sections import Pool

SLIVER = 0.001  # what Ray requests of ``accelerator_type:X``; every such node offers 1 of it
EXACT = 1e-9  # fractions of a resource add up with errors of rounding
GPU_CPUS = 0.5  # CPUs of a replica on a GPU: it waits for the device most of the time

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Reservation:
    """The resources that one replica of a pool reserves, and the pool's size.

    The pool starts with ``start_replicas`` and keeps them: Ray Data would release replicas of a
    pool while its first shards are still on their way, each after it has loaded its model. It grows
    up to ``max_replicas`` while it is busy and nodes have room.
    """

    min_replicas: int
    max_replicas: int
    num_cpus: float
    num_gpus: float
    start_replicas: int = 1
    accelerator_type: str | None = None
    resources: Amounts = field(default_factory=dict)

    @property
    def demand(self) -> dict[str, float]:
        """Resource -> amount that one replica reserves, in Ray's names."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        if self.accelerator_type:
            asked[f"accelerator_type:{self.accelerator_type}"] = SLIVER
        return {name: amount for name, amount in asked.items() if amount}


Pools = Sequence[tuple[type[StageActor], Reservation]]


def pools_of(plan: Plan, shards: int, nodes_may_join: bool = True) -> Pools:
    """The layout's pools: actor class and reservation, never more replicas than shards.

    Args:
        plan: the plan of the job.
        shards: number of shards to generate.
        nodes_may_join: the cluster may become larger during the run. Where it may not, encoders
            and decoders are at most half as many as denoisers unless the spec says how many: their
            queues are full for a moment at the start, and each one more takes seconds to load.
    """
    resources = plan.spec.resources
    gpus = ray.cluster_resources().get("GPU", 0.0)
    wanted: list[tuple[type[StageActor], Pool, float, float]]  # with default CPUs and GPUs
    if resources.layout == "fused":
        wanted = [(Generate, resources.generate, 0.9, 1.0)]
    else:
        wanted = [
            (Encode, resources.encode, 0.1, SHARES["encode"]),  # on a GPU, as in ``fused``
            (Denoise, resources.denoise, 0.6, SHARES["denoise"]),
            (Decode, resources.decode, 0.2, SHARES["decode"]),
        ]
    pools = [
        (actor, _reservation(pool, cpu_share, gpu_share if gpus else 0.0, shards))
        for actor, pool, cpu_share, gpu_share in wanted
    ]
    room = Room(nodes_that_stay())
    for _, reservation in pools:
        for _ in range(reservation.min_replicas):
            room.take(reservation.demand)
    # Staged: denoising is most of the work, so its pool starts with all the room that the other
    # pools' minimum leaves. Ray Data would add replicas one by one, each after it has loaded.
    started = [
        (actor, replace(one, start_replicas=one.min_replicas))
        if actor in (Encode, Decode)
        else (actor, _started(one, room))
        for actor, one in pools
    ]
    if nodes_may_join or resources.layout == "fused":
        return started
    half = -(-dict(started)[Denoise].start_replicas // 2)
    asked = {Encode: resources.encode.max_replicas, Decode: resources.decode.max_replicas}
    return [
        (actor, _at_most(half, one) if actor in asked and asked[actor] is None else one)
        for actor, one in started
    ]


def _at_most(replicas: int, reservation: Reservation) -> Reservation:
    limit = max(reservation.min_replicas, min(reservation.max_replicas, replicas))
    return replace(reservation, max_replicas=limit)


def _reservation(pool: Pool, cpu_share: float, gpu_share: float, shards: int) -> Reservation:
    num_gpus = pool.num_gpus if pool.num_gpus is not None else gpu_share
    default_cpus = min(cpu_share, GPU_CPUS) if num_gpus else cpu_share
    most = pool.max_replicas or shards
    return Reservation(
        min_replicas=pool.min_replicas,
        max_replicas=max(pool.min_replicas, min(most, shards)),
        num_cpus=pool.num_cpus if pool.num_cpus is not None else default_cpus,
        num_gpus=num_gpus,
        accelerator_type=pool.accelerator_type,
        resources=pool.resources,
    )


def _started(reservation: Reservation, room: Room) -> Reservation:
    """The same pool, starting with as many replicas as fit into the room."""
    start = reservation.min_replicas
    while start < reservation.max_replicas and room.take(reservation.demand):
        start += 1
    return replace(reservation, start_replicas=start)


def described(pools: Pools) -> str:
    """The pools' start sizes: ``2 replicas (CPU)``, ``1 encode, 3 denoise, 1 decode replicas
    (H100)``."""
    counts = [(actor.__name__.lower(), reservation.start_replicas) for actor, reservation in pools]
    if len(counts) == 1:
        many = counts[0][1]
        said = f"{many} replica{'' if many == 1 else 's'}"
    else:
        said = ", ".join(f"{many} {name}" for name, many in counts) + " replicas"
    prefix = "accelerator_type:"
    names = {name for node in nodes_that_stay() for name in node if name.startswith(prefix)}
    gpus = ", ".join(sorted(name.removeprefix(prefix) for name in names)) or "GPU"
    return f"{said} ({gpus if any(reservation.num_gpus for _, reservation in pools) else 'CPU'})"


class Room:
    """The free resources of a cluster, node by node; of GPUs, device by device."""

    def __init__(self, nodes: Sequence[Amounts]) -> None:
        self._free = [Free(node) for node in nodes]

    def take(self, demand: Amounts) -> bool:
        """Take the demand from the first node that can meet it; False if no node can."""
        return any(node.take(demand) for node in self._free)


class Free:
    """What is free on one node. A fraction of a GPU must fit into one GPU, as Ray gives it out."""

    def __init__(self, node: Amounts) -> None:
        self._amounts = {name: amount for name, amount in node.items() if name != "GPU"}
        self._gpus = [1.0] * int(node.get("GPU", 0.0))

    def take(self, demand: Amounts) -> bool:
        """Take the demand; False, and nothing taken, if it does not fit."""
        rest = {name: amount for name, amount in demand.items() if name != "GPU"}
        wanted = demand.get("GPU", 0.0)
        each = min(1.0, wanted)
        fitting = [place for place, free in enumerate(self._gpus) if free >= each - EXACT]
        count = math.ceil(wanted)
        if len(fitting) < count or any(
            self._amounts.get(name, 0.0) < amount - EXACT for name, amount in rest.items()
        ):
            return False
        # The fullest first, so that whole GPUs stay free for replicas that need them.
        for place in sorted(fitting, key=lambda place: self._gpus[place])[:count]:
            self._gpus[place] -= each
        for name, amount in rest.items():
            self._amounts[name] -= amount
        return True


def lacking(pools: Pools, nodes: Sequence[Amounts]) -> tuple[str, Reservation] | None:
    """The first pool whose ``min_replicas`` do not fit on the nodes with the other pools; or None.

    Pools with large demands are placed first: small replicas fit into what is left, large ones
    might not.
    """
    room = Room(nodes)
    hungry_first = sorted(pools, key=lambda pool: sum(pool[1].demand.values()), reverse=True)
    for actor, reservation in hungry_first:
        for _ in range(reservation.min_replicas):
            if not room.take(reservation.demand):
                return actor.__name__.lower(), reservation
    return None
