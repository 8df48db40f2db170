"""What each pool of the layout reserves, chosen from the spec and from what the cluster has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray

from batchgen.engine.actors import Decode, Denoise, Encode, Generate, StageActor
from batchgen.errors import UsageError
from batchgen.plan import Plan
from batchgen.spec import Pool

READER_CPUS = 0.05


@dataclass(frozen=True)
class Share:
    """What one replica of a pool reserves, and how many there may be."""

    min_replicas: int
    max_replicas: int
    num_cpus: float
    num_gpus: float


def pools_of(plan: Plan, shards: int) -> Pools:
    """The actors of the layout with what each reserves, no more of them than there are shards.

    Raises:
        UsageError: the smallest pools do not fit; says what was asked and what there is.
    """
    resources = plan.spec.resources
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    wanted: list[tuple[type[StageActor], Pool, float, float]]
    if resources.layout == "fused":
        wanted = [(Generate, resources.generate, 0.9, 1.0)]
    else:
        wanted = [
            (Encode, resources.encode, 0.1, 0.1),  # on the device that ``fused`` encodes on
            (Denoise, resources.denoise, 0.6, 0.8),
            (Decode, resources.decode, 0.2, 0.1),
        ]
    pools = []
    for actor, pool, cpu_share, gpu_share in wanted:
        many = actor in (Generate, Denoise)
        share = _share(pool, cpu_share, gpu_share, cpus, gpus, many)
        most = max(share.min_replicas, min(share.max_replicas, shards))
        pools.append((actor, replace(share, max_replicas=most)))
    _refuse_impossible([share for _, share in pools], cpus, gpus)
    return pools


Pools = Sequence[tuple[type[StageActor], Share]]


def _share(
    pool: Pool, cpu_share: float, gpu_share: float, cpus: float, gpus: float, many: bool
) -> Share:
    num_gpus = pool.num_gpus if pool.num_gpus is not None else (gpu_share if gpus else 0.0)
    default_cpus = cpu_share if not num_gpus else min(cpu_share, 0.5)
    num_cpus = pool.num_cpus if pool.num_cpus is not None else default_cpus
    fits = gpus // num_gpus if num_gpus else (cpus - READER_CPUS) // num_cpus
    most = pool.max_replicas or max(pool.min_replicas, int(fits) if many else 1, 1)
    return Share(pool.min_replicas, most, num_cpus, num_gpus)


def _refuse_impossible(shares: list[Share], cpus: float, gpus: float) -> None:
    asked_cpus = sum(share.min_replicas * share.num_cpus for share in shares)
    asked_gpus = sum(share.min_replicas * share.num_gpus for share in shares)
    if asked_cpus + READER_CPUS > cpus or asked_gpus > gpus:
        raise UsageError(
            f"the pools need at least {asked_cpus + READER_CPUS:g} CPUs and {asked_gpus:g} GPUs; "
            f"the cluster has {cpus:g} and {gpus:g}; lower min_replicas, num_cpus or num_gpus "
            "under resources"
        )
