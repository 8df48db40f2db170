"""The parts of loaded models, called alone with data on the device, and their rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_machine import drawn, rate
from benchmarks.gpu_stages import Arguments, Loaded, batch, call, captured, pixels_of


def ceiling(bench: Bench) -> None:
    """The matmul rate of this process's moment, as the clock of a card changes."""
    size = 256 if bench.small else 8192
    left, right = drawn(bench, size, size), drawn(bench, size, size)
    bench.note("matmul_tflops", rate(bench, 2 * size**3, lambda: left @ right))


def inputs(bench: Bench, loaded: Loaded, size: int) -> Arguments:
    """What the denoiser gets in the first step of a micro-batch of ``size`` samples."""
    given = batch(range(size), call(pixels_of(bench, loaded.name), 1))
    return captured(loaded.denoiser, lambda: loaded.at(size).latents(given))


@torch.no_grad()
def step(module: Any, arguments: Arguments) -> Any:
    args, kwargs = arguments
    made = module(*args, **kwargs)
    return made[0] if isinstance(made, tuple) else made.sample


def teraflop(module: Any, arguments: Arguments) -> float:
    with FlopCounterMode(display=False) as counter:
        step(module, arguments)
    return counter.get_total_flops() / 1e12


def speed(bench: Bench, work: float, took: float, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"ms": round(took, 2), "ms_an_image": round(took / size, 3)}
    rated = work / took * 1000
    found["tflops"] = round(rated, 3)
    found["of_matmul"] = round(rated / max(1e-9, bench.found["matmul_tflops"]), 3)
    return found


def recorded(what: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of what the function launches, and its result, which replays overwrite."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        what()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = what()
    return graph, made


@torch.no_grad()
def forward(module: Any, args: Any, kwargs: Any) -> Any:
    return module(*args, **kwargs)


def latents_of(bench: Bench, loaded: Loaded, size: int) -> Any:
    given = batch(range(size), call(pixels_of(bench, loaded.name), 1))
    return loaded.at(size).latents(given)
