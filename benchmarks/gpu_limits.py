"""Sections 4, 5 and 6: how fast the device runs each part of a model, alone and with data resident.

The parts are those of batchgen's loaded stages; their inputs are those that the stages give them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from batchgen.families import family_named
from batchgen.models.place import place
from batchgen.stages.decode import Decoder
from batchgen.stages.denoise import Denoiser
from batchgen.stages.encode import Encoder
from benchmarks import gpu_models
from benchmarks.gpu_bench import Bench, sha
from benchmarks.gpu_kernels import compiled, float8, offloaded, warm_elsewhere
from benchmarks.gpu_machine import attempt
from benchmarks.gpu_parts import (
    ceiling,
    forward,
    inputs,
    latents_of,
    recorded,
    speed,
    step,
    teraflop,
)
from benchmarks.gpu_stages import TEXT, Loaded, batch, call, captured, dtype_of, load, pixels_of


def sd15_limits(bench: Bench) -> None:
    loaded = load(bench, "sd15", 8)
    bench.note("load_seconds", loaded.seconds)
    ceiling(bench)
    sizes = (1, 2) if bench.small else (1, 2, 4, 8, 16, 32)
    eager(bench, loaded, sizes)
    graphs(bench, loaded, sizes[:1] if bench.small else (1, 8, 32))
    bench.measure("text", lambda: text(bench, loaded))
    vaes(bench, loaded, sizes)
    size = sizes[-1] if bench.small else 8
    bench.measure(f"compiled_b{size}", partial(compiled, bench, loaded, size), needs_s=30)
    bench.measure("compiled_new_process", lambda: warm_elsewhere(bench), needs_s=25)
    if not bench.small:
        bench.measure("compiled_b32", partial(compiled, bench, loaded, 32), needs_s=30)


def sdxl_limits(bench: Bench) -> None:
    loaded = load(bench, "sdxl", 8)
    bench.note("load_seconds", loaded.seconds)
    ceiling(bench)
    sizes = (1, 2) if bench.small else (1, 2, 4, 8, 16)
    eager(bench, loaded, sizes)
    graphs(bench, loaded, sizes[:1] if bench.small else (1, 8))
    bench.measure("text", lambda: text(bench, loaded))
    vaes(bench, loaded, sizes[:4])
    bench.measure("vae_float32", lambda: upcast(bench, loaded, sizes[:4]))
    size = sizes[-1] if bench.small else 8
    blocks = bench.left() < 60 and not bench.small
    name = f"compiled_{'blocks_' if blocks else ''}b{size}"
    if not bench.small:  # the other two sections try it
        bench.measure(name, partial(compiled, bench, loaded, size, blocks), needs_s=25)
    bench.measure("float8", lambda: float8(bench, loaded, size), needs_s=8)


def flux_limits(bench: Bench) -> None:
    loaded = whole_flux(bench)
    bench.note("load_seconds", loaded.seconds)
    ceiling(bench)
    sizes = (1, 2) if bench.small else (1, 2, 4)
    eager(bench, loaded, sizes)
    bench.measure("text", lambda: text(bench, loaded))
    vaes(bench, loaded, sizes[::2])
    bench.measure("compiled_blocks_b1", partial(compiled, bench, loaded, 1, True), needs_s=12)
    bench.measure("offloaded", lambda: offloaded(bench, loaded, sizes[-1]), needs_s=6)


def whole_flux(bench: Bench) -> Loaded:
    """Flux built on the device: saved, it would take longer to load than the section lasts."""
    start = time.perf_counter()
    device, dtype = bench.device, getattr(torch, dtype_of(bench))
    pipeline = gpu_models.flux(bench.work / "flux", bench.small, device, dtype)
    place([pipeline], [device])
    bench.wait()
    family = family_named(TEXT, "flux")
    seconds = {"build_on_device": round(time.perf_counter() - start, 2)}
    none: Any = None  # a model that is not loaded by a spec has neither spec nor facts
    return Loaded(
        "flux",
        family,
        none,
        none,
        Encoder(pipeline, family.adapter, 1),
        Denoiser(pipeline, family.adapter, 1),
        Decoder(pipeline, family.adapter, 1),
        seconds,
    )


def eager(bench: Bench, loaded: Loaded, sizes: Sequence[int]) -> None:
    """One call of the denoiser; with guidance it has twice as many rows as images."""
    for size in sizes:
        bench.measure(f"eager_b{size}", partial(_eager, bench, loaded, size), needs_s=4)


def _eager(bench: Bench, loaded: Loaded, size: int) -> dict[str, Any]:
    given = inputs(bench, loaded, size)
    work = teraflop(loaded.denoiser, given)
    took = bench.milliseconds(lambda: step(loaded.denoiser, given))
    peak = bench.peak_gib(lambda: step(loaded.denoiser, given))
    return {**speed(bench, work, took, size), "peak_gib": peak}


def graphs(bench: Bench, loaded: Loaded, sizes: Sequence[int]) -> None:
    """The same kernels, launched as one CUDA graph; the bytes must be equal."""
    for size in sizes:
        if bench.cuda:
            bench.measure(f"graph_b{size}", partial(_graph, bench, loaded, size), needs_s=5)
        else:
            bench.note(f"graph_b{size}", "skipped: a CPU has no graphs")


def _graph(bench: Bench, loaded: Loaded, size: int) -> dict[str, Any]:
    given = inputs(bench, loaded, size)
    wanted = step(loaded.denoiser, given)
    graph, made = recorded(lambda: step(loaded.denoiser, given))
    graph.replay()
    same = "equal" if sha(made) == sha(wanted) else "other bytes"
    found = {
        **speed(bench, teraflop(loaded.denoiser, given), bench.milliseconds(graph.replay), size)
    }
    return {**found, "against_eager": same}


def text(bench: Bench, loaded: Loaded) -> dict[str, Any]:
    """Prompts through batchgen's encoder one by one, and each text encoder alone."""
    encode = loaded.encode
    shared = call(pixels_of(bench, loaded.name), 1)
    rows = iter(range(10**6))

    def fresh() -> None:
        encode(batch([next(rows) for _ in range(8)], shared))

    found: dict[str, Any] = {"encoder_8_new_prompts_ms": bench.milliseconds(fresh, most=5)}
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(encode.pipeline, name, None)
        if encoder is None:
            continue
        args, kwargs = captured(
            encoder, partial(encode.adapter.encode_prompt, encode.pipeline, "a", False)
        )
        found[f"{name}_ms"] = bench.milliseconds(
            lambda e=encoder, a=args, k=kwargs: forward(e, a, k)
        )
        eight = tuple(
            torch.cat([one] * 8) if isinstance(one, torch.Tensor) else one for one in args
        )
        more = {
            k: torch.cat([v] * 8) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
        }
        found[f"{name}_8_together_ms"] = bench.milliseconds(
            lambda e=encoder, a=eight, k=more: forward(e, a, k)
        )
        if bench.cuda:
            found[f"{name}_graph_ms"] = attempt(
                lambda e=encoder, a=args, k=kwargs: graphed(bench, e, a, k)
            )
    return found


def graphed(bench: Bench, module: Any, args: Any, kwargs: Any) -> float:
    graph, _ = recorded(lambda: forward(module, args, kwargs))
    return bench.milliseconds(graph.replay)


def vaes(bench: Bench, loaded: Loaded, sizes: Sequence[int]) -> None:
    for size in sizes:
        bench.measure(f"vae_b{size}", partial(_vae, bench, loaded, size), needs_s=4)


def _vae(bench: Bench, loaded: Loaded, size: int) -> dict[str, Any]:
    """The family's decode on latents that are on the device, in both memory formats."""
    made = latents_of(bench, loaded, size)
    pipeline, adapter = loaded.decode.pipeline, loaded.decode.adapter
    vae = getattr(pipeline, loaded.family.vae)
    found: dict[str, Any] = {}

    @torch.no_grad()
    def decode() -> Any:
        return adapter.decode(pipeline, made.latents, made.call)

    for name, order in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        vae.to(memory_format=order)
        took = bench.milliseconds(decode, spend_s=0.3)
        found[name] = {"ms_an_image": round(took / size, 3), "peak_gib": bench.peak_gib(decode)}
    vae.to(memory_format=torch.contiguous_format)
    stage = loaded.at(size).decode
    found["decoder_ms_an_image"] = round(bench.milliseconds(lambda: stage(made)) / size, 3)
    return found


def upcast(bench: Bench, loaded: Loaded, sizes: Sequence[int]) -> dict[str, Any]:
    """The VAE in float32, as diffusers runs that of a float16 SDXL: casts included."""
    vae = loaded.decode.pipeline.vae
    before = vae.dtype
    vae.to(dtype=torch.float16)
    found: dict[str, Any] = {}
    try:
        for size in sizes:
            if bench.left() < 6 and not bench.small:
                found[f"b{size}"] = "skipped: no time"
                continue
            try:
                found[f"b{size}"] = _vae(bench, loaded, size)["nchw"]
            except torch.OutOfMemoryError:
                found[f"b{size}"] = "out of memory"
                bench.free()
    finally:
        vae.to(dtype=before)
    return found
