"""Compares the memory that a job needs with the memory of this machine and of usual GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from batchgen.cli.machine import Check, gib
from batchgen.engine.batch_size import Group, groups_of, largest
from batchgen.models.memory import FUSED, HEADROOM, STAGES, MemoryNeed, need_of
from batchgen.plan.call_settings import usual_call
from batchgen.plan.plan import Plan
from batchgen.records import DeviceInfo

GIB = 1 << 30
USUAL_GIB = (16, 24, 48, 80)  # memory of GPUs that many users have
CPUS = 0.9  # num_cpus of a fused replica without a GPU
PROCESS_BYTES = GIB  # a replica's libraries; 660 MB were measured with the shipped model
MEMORY_FILE = Path("/proc/meminfo")


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
    resources = plan.spec.resources
    groups = [one for one in groups_of(resources) if one.gpus]
    if not groups:
        need = need.offloading(())
    size, decode = resources.micro_batch, resources.decode_size
    parts = [f"{one} {gib(need.peak(one, size, decode))}" for one in STAGES]
    shown = f"{size}" if decode == size else f"{size} (decode {decode})"
    yield Check(
        "memory of a replica",
        "ok",
        f"at batch size {shown}: {', '.join(parts)}; all stages in one process "
        f"{gib(need.peak(FUSED, size, decode))}, of which {gib(need.weights(FUSED))} are weights"
        f"{_kept(need)}",
    )
    if groups and (known := [one for one in gpus if one.memory_bytes]):
        least = min(known, key=lambda one: one.memory_bytes)
        yield fits(need, groups, (size, decode), least.name, least.memory_bytes)
    elif groups:
        sizes = [
            f"{one} GiB: {largest(need, groups, one * GIB, resources.decode_batch_size)}"
            for one in USUAL_GIB
        ]
        yield Check("largest batch size on a GPU", "ok", f"with {', '.join(sizes)}")
    yield from host(plan, need, groups, len(gpus) if groups else 0)


def fits(
    need: MemoryNeed,
    groups: Sequence[Group],
    sizes: tuple[int, int],
    name: str,
    gpu_bytes: int,
) -> Check:
    """Compare the need at this batch and decode size with the GPU; say which batch size fits."""
    size, decode = sizes
    best = largest(need, groups, gpu_bytes, None if decode == size else decode)
    wanted = []
    for group in groups:
        peak = gib(sum(need.peak(one, size, decode) for one in group.stages))
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
    more = with_offload(need, groups, sizes, gpu_bytes, best)
    return Check("memory of the GPU", "warning", f"{said}: {advice}{more}")


def with_offload(
    need: MemoryNeed, groups: Sequence[Group], sizes: tuple[int, int], gpu_bytes: int, best: int
) -> str:
    """How far more offloading would help, as the end of a sentence; empty if it would not.

    Args:
        need: with what is offloaded now.
        groups: of the stages that share GPUs.
        sizes: the batch and the decode size.
        gpu_bytes: memory of one GPU.
        best: the largest batch size that fits now.
    """
    single = [one for group in groups if group.gpus <= 1 for one in group.stages]
    able = [
        one
        for one in ("encode", "denoise")
        if one not in need.offload and (one in single or FUSED in single)
    ]
    size, decode = sizes
    fit: dict[tuple[str, ...], int] = {}
    for more in [*((one,) for one in able), tuple(able)]:
        stages = (*need.offload, *more)
        decode_size = None if decode == size else decode
        fit[stages] = largest(need.offloading(stages), groups, gpu_bytes, decode_size)
    enough = [stages for stages, fits_now in fit.items() if fits_now >= size]
    stages = enough[0] if enough else max(fit, key=lambda one: fit[one])
    if fit[stages] <= best:
        return ""
    return (
        f"; with resources.offload: [{', '.join(stages)}], which keeps weights in host memory, "
        f"batch sizes up to {fit[stages]} fit"
    )


def _kept(need: MemoryNeed) -> str:
    if not need.offload:
        return ""
    stages = " and ".join(need.offload)
    return f"; the weights of {stages} are in host memory ({gib(need.host(FUSED))})"


def host(plan: Plan, need: MemoryNeed, groups: Sequence[Group], gpus: int) -> Iterator[Check]:
    """Compare this machine's memory with that of the replicas that would start on it.

    A replica loads its stages one after the other, each into host memory and from there onto its
    GPU, except those that are offloaded; without a GPU everything stays in host memory.
    """
    free = available()
    if free is None:
        return
    resources = plan.spec.resources
    stages = (FUSED,) if resources.layout == "fused" else STAGES
    processes = len(stages) * PROCESS_BYTES
    if gpus:
        count = int(gpus / sum(one.gpus for one in groups))
        loaded = need.offloading(())  # an offloaded stage is copied once more, to pinned memory
        largest_stage = max(loaded.weights(one) for one in STAGES)
        each = processes + need.host(FUSED)
        each += sum(loaded.weights(one) if one != FUSED else largest_stage for one in stages)
        said = "replicas that load at the same time"
    else:
        need = need.offloading(())
        pool = resources.generate
        count = int((os.cpu_count() or 1) / (pool.num_cpus or CPUS)) if len(stages) == 1 else 1
        each = processes + sum(
            need.peak(one, resources.micro_batch, resources.decode_size) for one in stages
        )
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
