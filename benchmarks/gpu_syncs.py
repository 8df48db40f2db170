"""Section 2: where the host waits for the device, and what stage times by host clocks are worth."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batchgen import models
from batchgen.families.schedulers import FLOW_SCHEDULERS, SCHEDULERS
from batchgen.models.tiny import BUILDERS
from batchgen.records import ConditionBatch
from batchgen.spec.build import build
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_stages import TEXT, batch, call, load, load_stages, pixels_of, prompts

BATCH, STEPS = 8, 20
FEW, MORE = 4, 8


def syncs(bench: Bench) -> None:
    bench.measure("waits", lambda: of_schedulers(bench))
    bench.measure("clocks", lambda: clocks(bench), needs_s=8)


class Reads(TorchDispatchMode):
    """Counts values that Python reads from tensors, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen[f"read from {args[0].device.type}"] += 1
        elif func in COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(made, torch.Tensor) and source.device != made.device:
                self.seen[f"{source.device.type} to {made.device.type}"] += 1
        return made


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


@contextmanager
def waits(bench: Bench, counted: Counter[str]) -> Iterator[None]:
    """Count what makes the host wait: reads and copies, and on CUDA the warnings of torch."""
    reads = Reads()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with reads:
                yield
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")
    counted.update(reads.seen)
    said = sum("called a synchronizing" in str(one.message) for one in warned)
    if said:
        counted["cuda syncs"] += said


def of_schedulers(bench: Bench) -> dict[str, Any]:
    """For each scheduler, on tiny models: waits of a micro-batch by stage, and for each step."""
    every = (*SCHEDULERS, *FLOW_SCHEDULERS)
    if bench.small:
        every = ("PNDMScheduler", "EulerDiscreteScheduler", *FLOW_SCHEDULERS)
    folders = {
        name: BUILDERS[TEXT, name](bench.work / f"tiny-{name}")
        for name in ("stable-diffusion", "flux")
    }
    found: dict[str, Any] = {}
    for name in every:
        flow = name in FLOW_SCHEDULERS
        folder = folders["flux" if flow else "stable-diffusion"]
        found[name.removesuffix("Scheduler")] = _of_scheduler(bench, str(folder), name)
    return found


def _of_scheduler(bench: Bench, folder: str, name: str) -> dict[str, Any]:
    spec = build(
        {
            "task": TEXT,
            "input": {"path": str(prompts(bench))},
            "model": {"path": folder, "dtype": "float32", "scheduler": name},
            "output": {"url": str(bench.work / "outputs" / "none")},
            "resources": {"batch_size": 4},
        }
    )
    stages = load_stages(spec, models.inspect(spec.model, TEXT), [bench.device])
    _counts(bench, stages, FEW)  # first calls set up kernels
    few, more = _counts(bench, stages, FEW), _counts(bench, stages, MORE)
    kinds = {kind for kind in (*few["denoise"], *more["denoise"])}
    each = {
        kind: round((more["denoise"][kind] - few["denoise"][kind]) / (MORE - FEW), 2)
        for kind in sorted(kinds)
    }
    return {"a_step": {k: v for k, v in each.items() if v}, **{k: dict(v) for k, v in few.items()}}


def _counts(bench: Bench, stages: Any, steps: int) -> dict[str, Counter[str]]:
    value: Any = batch(range(4), call(32, steps))
    found: dict[str, Counter[str]] = {}
    for name, stage in zip(("encode", "denoise", "decode"), stages, strict=True):
        counted: Counter[str] = Counter()
        with waits(bench, counted):
            value = stage(value)
        found[name] = counted
    return found


def clocks(bench: Bench) -> dict[str, Any]:
    """Stage times of SD 1.5 by device events and by the host's clock; and each stage's peak."""
    loaded = load(bench, "sd15", 2 if bench.small else BATCH)
    size = pixels_of(bench, "sd15")
    count = loaded.denoise.batch_size
    given = batch(range(count), call(size, 2 if bench.small else STEPS))
    first = _clocked(bench, loaded, given)
    again = _clocked(bench, loaded, batch(range(count, 2 * count), given.call))
    return {"first_micro_batch": first, "second": again, "load_seconds": loaded.seconds}


def _clocked(bench: Bench, loaded: Any, given: ConditionBatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    marks: list[Any] = []
    value: Any = given
    for name in ("encode", "denoise", "decode"):
        stage: Callable[[Any], Any] = getattr(loaded, name)
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        marks.append(_mark(bench))
        start = time.perf_counter()
        value = stage(value)
        found[name] = {"host_ms": round((time.perf_counter() - start) * 1000, 2)}
        if bench.cuda:
            found[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / (1 << 30), 2)
    marks.append(_mark(bench))
    bench.wait()
    for name, left, right in zip(found, marks, marks[1:], strict=False):
        found[name]["device_ms"] = round(_between(bench, left, right), 2)
    return found


def _mark(bench: Bench) -> Any:
    if not bench.cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(bench: Bench, left: Any, right: Any) -> float:
    return float(left.elapsed_time(right)) if bench.cuda else (right - left) * 1000
