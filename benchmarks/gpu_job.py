"""Section 7: complete jobs without Ray, against what the device could do in the same time.

A job reads its rows, runs on FusedStages with two threads as in an actor, writes PNGs to a local
disk, and is verified. The limit is the time of the denoiser's calls and of the VAE, alone, with
data on the device.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from batchgen import models
from batchgen.output.ledger import Ledger
from batchgen.plan.plan import make_plan
from batchgen.records import Call
from batchgen.shard.stages import FusedStages
from batchgen.spec.places import anywhere, reach_stores
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from benchmarks.gpu_bench import GIB, Bench
from benchmarks.gpu_parts import inputs, step
from benchmarks.gpu_stages import (
    Loaded,
    Ran,
    batch,
    call,
    captured,
    job_rows,
    load,
    pixels_of,
    run_job,
    spec_of,
)

GAP_MS = 0.5


def jobs(bench: Bench) -> None:
    sd15_jobs(bench)
    bench.free()
    sdxl_jobs(bench)
    bench.note("ray_loaded", "ray" in sys.modules)


def sd15_jobs(bench: Bench) -> None:
    loaded = load(bench, "sd15", 2 if bench.small else 8)
    bench.note("sd15_load_seconds", loaded.seconds)
    bench.measure("sd15_start", lambda: start_up(bench, loaded), needs_s=5)
    bench.measure("sd15_20_steps", lambda: against_limit(bench, loaded, 20, 5.0, 4, 64), needs_s=25)
    bench.measure("sd15_gaps", lambda: gaps(bench, loaded), needs_s=8)


def sdxl_jobs(bench: Bench) -> None:
    if bench.left() < 40 and not bench.small:
        bench.note("sdxl", f"skipped: {bench.left():.0f} s are left")
        return
    wide = load(bench, "sdxl", 2 if bench.small else 8)
    bench.note("sdxl_load_seconds", wide.seconds)
    bench.measure("sdxl_4_steps", lambda: against_limit(bench, wide, 4, 1.0, 2, 32), needs_s=15)
    bench.measure("sdxl_30_steps", lambda: against_limit(bench, wide, 30, 5.0, 2, 16), needs_s=35)


def start_up(bench: Bench, loaded: Loaded) -> dict[str, Any]:
    """What a replica does before its first micro-batch: hash the files, load, move."""
    begun = time.perf_counter()
    models.inspect(loaded.spec.model, loaded.spec.task)
    hashed = time.perf_counter()
    stages = models.load_denoiser(loaded.info, loaded.spec)
    on_host = time.perf_counter()
    stages.pipeline.to(bench.device)
    bench.wait()
    moved = time.perf_counter()
    return {
        "inspect_and_hash_s": round(hashed - begun, 2),
        "denoiser_from_pretrained_s": round(on_host - hashed, 2),
        "denoiser_to_device_s": round(moved - on_host, 2),
    }


def against_limit(
    bench: Bench, loaded: Loaded, steps: int, guidance: float, shards: int, each: int
) -> dict[str, Any]:
    if bench.small:
        steps, shards, each = 2, 2, 3
    size = loaded.denoise.batch_size
    shared = call(pixels_of(bench, loaded.name), steps, guidance)
    limit = limits(bench, loaded, shared)
    spec = job_spec(bench, loaded, shared, shards, each)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    ran = run_job(spec, loaded.info, (loaded.encode, loaded.denoise, loaded.decode), bench.device)
    rate = ran.accepted / ran.seconds
    device_rate = 1000 * size / (limit["denoiser_ms"] + limit["vae_ms"])
    found = {
        "images": ran.accepted,
        "seconds": round(ran.seconds, 2),
        "images_a_second": round(rate, 3),
        "device_limit": round(device_rate, 3),
        "of_limit": round(rate / device_rate, 4),
        "of_denoiser_limit": round(rate * limit["denoiser_ms"] / 1000 / size, 4),
        **limit,
        "host_seconds_in_markers": host_seconds(ran),
        "bytes_an_image": _bytes(ran.output) // max(1, ran.accepted),
        "problems": ran.problems,
    }
    if bench.cuda:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return found


def job_spec(bench: Bench, loaded: Loaded, shared: Call, shards: int, each: int) -> Spec:
    name = f"{loaded.name}-{shared.num_inference_steps}-{time.monotonic_ns()}"
    return spec_of(
        bench,
        loaded.name,
        loaded.denoise.batch_size,
        name,
        input={"limit": shards * each},
        output={"samples_per_shard": each},
        sampling={
            "num_inference_steps": shared.num_inference_steps,
            "guidance_scale": shared.guidance_scale,
        },
    )


def limits(bench: Bench, loaded: Loaded, shared: Call) -> dict[str, Any]:
    """Milliseconds of a micro-batch's denoiser calls and of its VAE, with inputs on the device."""
    size = loaded.denoise.batch_size
    given = batch(range(size), shared)
    calls = Counter[str]()
    handle = loaded.denoiser.register_forward_pre_hook(lambda *_: calls.update(["denoiser"]))
    made = loaded.latents(given)
    handle.remove()
    arguments = inputs_of(bench, loaded, shared)
    once = bench.milliseconds(lambda: step(loaded.denoiser, arguments))

    @torch.no_grad()
    def decode() -> Any:
        return loaded.decode.adapter.decode(loaded.decode.pipeline, made.latents, shared)

    return {
        "denoiser_calls": calls["denoiser"],
        "denoiser_ms": round(once * calls["denoiser"], 2),
        "vae_ms": bench.milliseconds(decode),
    }


def inputs_of(bench: Bench, loaded: Loaded, shared: Call) -> Any:
    if shared.guidance_scale > 1:
        return inputs(bench, loaded, loaded.denoise.batch_size)
    given = batch(range(loaded.denoise.batch_size), shared)
    return captured(loaded.denoiser, lambda: loaded.latents(given))


def host_seconds(ran: Ran) -> dict[str, float]:
    """The stage times of all markers together, as a report shows them."""
    total = Counter[str]()
    for marker in ran.markers:
        total.update(marker.timings_s)
    return {name: round(value, 3) for name, value in total.items()}


def _bytes(folder: Path) -> int:
    return sum(one.stat().st_size for one in (folder / "data").rglob("*") if one.is_file())


# --- what the device waits for -------------------------------------------------------------------


class Ranged:
    """A stage whose calls the profiler shows under its name."""

    def __init__(self, name: str, stage: Any) -> None:
        self.name, self.stage, self.pipeline = name, stage, stage.pipeline

    def __call__(self, value: Any) -> Any:
        with torch.profiler.record_function(f"stage {self.name}"):
            return self.stage(value)

    def start(self, value: Any, **size: int) -> Any:
        with torch.profiler.record_function(f"stage {self.name}"):
            return self.stage.start(value, **size)


def gaps(bench: Bench, loaded: Loaded) -> dict[str, Any]:
    """A profile of two micro-batches: how busy the device is, and in which stage it waits.

    Of the few steps here a smaller part of the time is spent in the denoiser than usually, so
    read the milliseconds, not the share.
    """
    named = ("encode", "denoise", "decode")
    stages: Any = FusedStages(
        *(Ranged(name, getattr(loaded, name)) for name in named), bench.device
    )
    size = loaded.denoise.batch_size
    spec = job_spec(bench, loaded, call(pixels_of(bench, loaded.name), 4), 2, 2 * size)
    reach_stores(spec)
    plan = make_plan(anywhere(spec), loaded.info)
    ledger = Ledger(open_store(spec.output.url))
    ledger.freeze(plan, plan.spec)
    first, second = job_rows(plan.spec, plan)
    stages(first, plan, ledger, 1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    with torch.profiler.profile(activities=kinds) as profile:
        stages(second, plan, ledger, 1)
        bench.wait()
    return summed(list(profile.events()), 2)


def summed(events: Sequence[Any], micro_batches: int) -> dict[str, Any]:
    """Busy share of the device, and milliseconds of its gaps for each micro-batch by stage.

    Args:
        events: of torch's profiler. Those of stages have the name ``stage ...``.
    """
    ranges = [
        (one.time_range.start, one.time_range.end, one.name.removeprefix("stage "))
        for one in events
        if one.name.startswith("stage ") and one.device_type == torch.autograd.DeviceType.CPU
    ]
    first, last = min(one[0] for one in ranges), max(one[1] for one in ranges)
    work = sorted(
        (one.time_range.start, one.time_range.end)
        for one in events
        if one.device_type == torch.autograd.DeviceType.CUDA and not one.name.startswith("stage ")
    )
    found: dict[str, Any] = {"stages": Counter(one[2] for one in ranges), "kernels": len(work)}
    if not work:
        return {**found, "busy": None}
    waits, worst, busy_until, idle = Counter[str](), [], first, 0.0
    for start, end in [*work, (last, last)]:
        if start > busy_until:
            idle += start - busy_until
            cause = _cause(ranges, (start + busy_until) / 2)
            waits[cause] += start - busy_until
            worst.append((round((start - busy_until) / 1000, 2), cause))
        busy_until = max(busy_until, end)
    found["busy"] = round(1 - idle / (last - first), 4)
    found["idle_ms_a_micro_batch"] = {
        cause: round(value / 1000 / micro_batches, 2) for cause, value in waits.items()
    }
    found["longest_gaps_ms"] = sorted((one for one in worst if one[0] > GAP_MS), reverse=True)[:12]
    return found


def _cause(ranges: Sequence[tuple[float, float, str]], at: float) -> str:
    return next((name for start, end, name in ranges if start <= at <= end), "between stages")
