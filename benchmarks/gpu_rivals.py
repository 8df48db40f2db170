"""Section 8: batchgen and what users write without it, on SD 1.5 with 20 steps, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_job import job_spec
from benchmarks.gpu_stages import call, folder_of, load, pixels_of, run_job

Rival = Callable[[Bench, Any, Path, int], int]


def rivals(bench: Bench) -> None:
    loaded = load(bench, "sd15", 2 if bench.small else 8)
    bench.note("load_seconds", loaded.seconds)
    steps = 2 if bench.small else 20
    pipeline = plain(bench)
    shared = call(pixels_of(bench, "sd15"), steps)

    def ours() -> dict[str, Any]:
        spec = job_spec(bench, loaded, shared, 2, 2 if bench.small else 32)
        stages = (loaded.encode, loaded.denoise, loaded.decode)
        ran = run_job(spec, loaded.info, stages, bench.device)
        return {"images": ran.accepted, "images_a_second": round(ran.accepted / ran.seconds, 3)}

    first = bench.measure("batchgen", ours, needs_s=8)
    rates = {}
    for name, rival in RIVALS.items():
        found = bench.measure(name, partial(timed, bench, rival, pipeline, steps), needs_s=6)
        if found is not None:
            rates[name] = found["images_a_second"]
    again = bench.measure("batchgen_again", ours, needs_s=8)
    mine = [one["images_a_second"] for one in (first, again) if one]
    if mine:
        best = sum(mine) / len(mine)
        bench.note("batchgen_over", {name: round(best / rate, 2) for name, rate in rates.items()})


def plain(bench: Bench) -> Any:
    from diffusers import StableDiffusionPipeline

    dtype = torch.float16 if bench.cuda else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder_of(bench, "sd15"), dtype=dtype, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(bench.device)


@contextmanager
def as_a_user(small: bool) -> Iterator[None]:
    """torch's own settings, which batchgen's loading has changed in this process."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(1 if small else len(os.sched_getaffinity(0)))
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


def timed(bench: Bench, rival: Rival, pipeline: Any, steps: int) -> dict[str, Any]:
    folder = bench.work / f"rival-{rival.__name__}"
    folder.mkdir(exist_ok=True)
    with as_a_user(bench.small):
        rival(bench, pipeline, folder, 1)
        bench.wait()
        start = time.perf_counter()
        images = rival(bench, pipeline, folder, steps)
        bench.wait()
        seconds = time.perf_counter() - start
    return {"images": images, "images_a_second": round(images / seconds, 3)}


def made(bench: Bench, pipeline: Any, count: int, steps: int, output: str) -> Any:
    size = pixels_of(bench, "sd15")
    prompts = [f"a red star number {number}" for number in range(count)]
    return pipeline(
        prompts,
        negative_prompt=["grey"] * count,
        num_inference_steps=steps,
        guidance_scale=5.0,
        width=size,
        height=size,
        output_type=output,
    ).images


def batch_1(bench: Bench, pipeline: Any, folder: Path, steps: int) -> int:
    """One image a call, saved as PNG in the loop."""
    count = 2 if bench.small else 8
    for number in range(count):
        made(bench, pipeline, 1, steps, "pil")[0].save(folder / f"{number}.png")
    return count


def batched(bench: Bench, pipeline: Any, folder: Path, steps: int) -> int:
    """Eight images a call, saved as PNG in the loop."""
    size, calls = (2, 1) if bench.small else (8, 3)
    for turn in range(calls):
        for number, image in enumerate(made(bench, pipeline, size, steps, "pil")):
            image.save(folder / f"{turn}-{number}.png")
    return size * calls


def arrays(bench: Bench, pipeline: Any, folder: Path, steps: int) -> int:
    """The pattern of Ray's own test: float32 arrays from one stage, PNG in the next, no overlap.

    Ray's object store is left out; it would take more time.
    """
    size, calls = (2, 1) if bench.small else (8, 3)
    for turn in range(calls):
        found = made(bench, pipeline, size, steps, "np")
        for number, image in enumerate(found):
            pixels = np.rint(image * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{turn}-{number}.png")
    return size * calls


RIVALS: dict[str, Rival] = {"batch_1": batch_1, "batched": batched, "arrays": arrays}
