"""Finds the device that a plan is made for: the weakest one that the spec's pools may use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from batchgen.cluster.accelerators import named
from batchgen.cluster.addresses import joined
from batchgen.cluster.driver import visible_gpus
from batchgen.errors import UsageError
from batchgen.records import DeviceInfo
from batchgen.spec.sections import Pool
from batchgen.spec.spec import Spec

TYPE = "accelerator_type:"
DTYPE = "model.dtype"
NEWEST = (99, 0)  # a GPU that is not known is taken for one that is newer than the list of names


def device_for(spec: Spec, address: str | None) -> DeviceInfo | None:
    """The weakest device that a run may use, on this machine or the cluster at ``address``.

    A cluster is joined for it only if a field of the spec depends on it, or the quantization;
    otherwise None is returned. Ray is never started for it.

    Raises:
        UsageError: the cluster cannot be reached, or has no GPU yet by which to choose the field.
    """
    if not spec.resources.may_use_gpus:
        return DeviceInfo()
    if not uses_running_ray(address):
        return weakest(visible_gpus())
    quantization = spec.model.quantization
    needs_float8 = quantization is not None and quantization.multiplies_float8
    if not spec.open_fields and not needs_float8:
        return None
    from batchgen.cluster.join import cluster, nodes_that_stay

    with cluster(address) as may_grow:
        return weakest_of(nodes_that_stay(), spec, may_grow)


def uses_running_ray(address: str | None) -> bool:
    """Whether a run would use a Ray that is running, so that its devices may be elsewhere."""
    if joined(address):
        return True
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def weakest_of(
    nodes: Sequence[Mapping[str, float]], spec: Spec, may_grow: bool = True
) -> DeviceInfo:
    """The weakest GPU of a cluster that the pools may use; the CPU if they will use none.

    Args:
        nodes: resource -> amount, for each node.
        spec: names the pools and the fields that depend on the device.
        may_grow: nodes may still be added.

    Raises:
        UsageError: a pool asks for GPUs that are only added later.
    """
    found: list[DeviceInfo] = []
    for name, pool in spec.resources.pools.items():
        gpus = _usable(pool, nodes)
        if not gpus and pool.num_gpus and may_grow:
            if DTYPE in spec.open_fields:
                raise _unknown(name, pool)
            gpus = [DeviceInfo("GPU that is added later")]
        found += gpus
    return weakest(found)


def _usable(pool: Pool, nodes: Sequence[Mapping[str, float]]) -> list[DeviceInfo]:
    if pool.num_gpus == 0:
        return []
    if pool.accelerator_type is not None:  # also if no such node has been started yet
        return [named(pool.accelerator_type)]
    fit = [
        node
        for node in nodes
        if node.get("GPU") and all(node.get(one, 0) >= some for one, some in pool.resources.items())
    ]
    return [_gpu_of(node) for node in fit]


def _gpu_of(node: Mapping[str, float]) -> DeviceInfo:
    """The GPU of a node by Ray's name. Of several names (A100, A100-80G), one is more exact."""
    names = [name.removeprefix(TYPE) for name in node if name.startswith(TYPE)]
    gpus = [named(name) for name in names]
    return max(gpus, key=lambda one: one.memory_bytes, default=DeviceInfo("GPU without a name"))


def weakest(gpus: Iterable[DeviceInfo]) -> DeviceInfo:
    """The GPU with the lowest compute capability, with the smallest memory of all of them.

    Without a GPU it is the CPU.
    """
    found = list(gpus)
    if not found:
        return DeviceInfo()
    least = min(found, key=lambda one: (one.capability or NEWEST, one.memory_bytes))
    names = sorted({one.name for one in found})
    name = least.name if len(names) == 1 else f"{least.name} (weakest of {', '.join(names)})"
    return replace(least, name=name, memory_bytes=min(one.memory_bytes for one in found))


def _unknown(name: str, pool: Pool) -> UsageError:
    return UsageError(
        f"{DTYPE} is auto, but the cluster has no GPU yet by which to choose it "
        f"(resources.{name}.num_gpus is {pool.num_gpus:g}): set it with --set {DTYPE}=bfloat16, or "
        f"float16 for GPUs older than A100; or set resources.{name}.accelerator_type"
    )
