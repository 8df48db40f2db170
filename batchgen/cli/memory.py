"""Compares the memory that a job needs with the memory of this machine and of usual GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchgen.cli.machine import Check, gib
from batchgen.models.memory import (
    FUSED,
    HEADROOM,
    STAGES,
    MemoryNeed,
    largest_batch,
    need_of,
)
from batchgen.plan.call_settings import usual_call
from batchgen.plan.plan import Plan
from batchgen.records import DeviceInfo
from batchgen.spec.sections import Resources

GIB = 1 << 30
USUAL_GIB = (16, 24, 48, 80)  # memory of GPUs that many users have
SHARES = {"encode": 0.1, "denoise": 0.8, "decode": 0.1}  # num_gpus of the pools by default
CPUS = 0.9  # num_cpus of a fused replica without a GPU
PROCESS_BYTES = GIB  # a replica's libraries; 660 MB were measured with the shipped model
MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class Group:
    """Stages whose replicas share GPUs: one replica of each, on ``gpus`` GPUs."""

    stages: tuple[str, ...]
    gpus: float


def needed(plan: Plan) -> MemoryNeed:
    """The need of the plan's model, at the plan's image size, dtype and guidance.

    Raises:
        ModelError: it cannot be computed.
    """
    return need_of(plan.model, plan.spec, usual_call(plan.spec, plan.model))


def told(plan: Plan, need: MemoryNeed, gpus: Sequence[DeviceInfo]) -> Iterator[Check]:
    """Yield the need of each stage, how it fits the GPUs, and the need of host memory.

    Args:
        gpus: those of this machine; of some the memory may be unknown.
    """
    size = plan.spec.resources.batch_size
    parts = [f"{one} {gib(need.peak(one, size))}" for one in STAGES]
    yield Check(
        "memory of a replica",
        "ok",
        f"at batch size {size}: {', '.join(parts)}; all stages in one process "
        f"{gib(need.peak(FUSED, size))}, of which {gib(need.weights(FUSED))} are weights",
    )
    groups = [one for one in groups_of(plan.spec.resources) if one.gpus]
    if groups and (known := [one for one in gpus if one.memory_bytes]):
        least = min(known, key=lambda one: one.memory_bytes)
        yield fits(need, groups, size, least.name, least.memory_bytes)
    elif groups:
        sizes = [f"{one} GiB: {largest(need, groups, one * GIB)}" for one in USUAL_GIB]
        yield Check("largest batch size on a GPU", "ok", f"with {', '.join(sizes)}")
    yield from host(plan, need, groups, len(gpus) if groups else 0)


def groups_of(resources: Resources) -> list[Group]:
    """Group the stages as a run places them: those with a fraction of a GPU share one."""
    if resources.layout == "fused":
        share = resources.generate.num_gpus
        return [Group((FUSED,), 1.0 if share is None else share)]
    pools = {"encode": resources.encode, "denoise": resources.denoise, "decode": resources.decode}
    shares = {
        name: SHARES[name] if pool.num_gpus is None else pool.num_gpus
        for name, pool in pools.items()
    }
    small = {name: share for name, share in shares.items() if share < 1}
    if sum(small.values()) > 1:
        return [Group((name,), share) for name, share in shares.items()]
    own = [Group((name,), share) for name, share in shares.items() if share >= 1]
    return [*own, *([Group(tuple(small), 1.0)] if small else [])]


def largest(need: MemoryNeed, groups: Sequence[Group], gpu_bytes: int) -> int:
    """The largest batch size that fits the GPUs of each group; 0 if none does."""
    return min(largest_batch(need, one.gpus * gpu_bytes, stages=one.stages) for one in groups)


def fits(need: MemoryNeed, groups: Sequence[Group], size: int, name: str, gpu_bytes: int) -> Check:
    """Compare the need at this batch size with the GPU, and say which batch size fits."""
    best = largest(need, groups, gpu_bytes)
    wanted = []
    for group in groups:
        peak = gib(sum(need.peak(one, size) for one in group.stages))
        what = "a replica" if group.stages == (FUSED,) else " + ".join(group.stages)
        gpus = "a GPU" if group.gpus == 1 else f"{group.gpus:g} GPUs"
        wanted.append(f"{what} needs {peak} of {gpus}")
    said = f"{', '.join(wanted)}; {name} has {gib(gpu_bytes)}, {HEADROOM:.0%} of it as reserve"
    if best >= size:
        return Check("memory of the GPU", "ok", f"{said}: batch sizes up to {best} fit")
    advice = (
        f"set resources.batch_size to {best} or less"
        if best
        else "no batch size fits; choose a smaller model.dtype, quantize the model "
        "(model.quantization), or give the replica more GPUs (num_gpus)"
    )
    return Check("memory of the GPU", "warning", f"{said}: {advice}")


def host(plan: Plan, need: MemoryNeed, groups: Sequence[Group], gpus: int) -> Iterator[Check]:
    """Compare this machine's memory with that of the replicas that would start on it.

    A replica loads its stages one after the other, each into host memory and from there onto its
    GPU; without a GPU everything stays in host memory.
    """
    free = available()
    if free is None:
        return
    resources = plan.spec.resources
    stages = (FUSED,) if resources.layout == "fused" else STAGES
    processes = len(stages) * PROCESS_BYTES
    if gpus:
        count = int(gpus / sum(one.gpus for one in groups))
        largest_stage = max(need.weights(one) for one in STAGES)
        each = processes + sum(
            need.weights(one) if one != FUSED else largest_stage for one in stages
        )
        said = "replicas that load at the same time"
    else:
        pool = resources.generate
        count = int((os.cpu_count() or 1) / (pool.num_cpus or CPUS)) if len(stages) == 1 else 1
        each = processes + sum(need.peak(one, resources.batch_size) for one in stages)
        said = "replicas on the CPU"
    count = max(1, min(count, plan.shards, resources.generate.max_replicas or count))
    grade = "warning" if count * each > free else "ok"
    yield Check(
        "memory of this machine",
        grade,
        f"{said}: up to {count} x {gib(each)}; {gib(free)} are available",
    )


def available() -> int | None:
    """Bytes of memory that this machine could give to new processes; None if it does not say."""
    try:
        lines = MEMORY_FILE.read_text().splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return int(fields["MemAvailable"]) << 10 if "MemAvailable" in fields else None
