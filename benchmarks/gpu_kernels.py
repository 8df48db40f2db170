"""A denoiser run in other ways than eagerly: compiled, in FP8, with blocks in host memory."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benchmarks.gpu_bench import Bench, furthest
from benchmarks.gpu_parts import inputs, latents_of, speed, step, teraflop
from benchmarks.gpu_stages import Arguments, Loaded, load

ARTIFACTS = "compiled.bin"
# A folder that holds torchao, used by this measurement only: diffusers would import it, and
# torchao's import may start CUDA, after which no process can be forked that uses it.
TORCHAO_AT = "TORCHAO_AT"


def compiled(bench: Bench, loaded: Loaded, size: int, blocks: bool = False) -> dict[str, Any]:
    """torch.compile of the denoiser with static shapes; its repeated blocks only, if ``blocks``."""
    module = loaded.denoiser
    given = inputs(bench, loaded, size)
    wanted = step(module, given)
    work = teraflop(module, given)
    latents = latents_of(bench, loaded, size)
    plain = loaded.at(size).decode(latents).pixels
    backend = "eager" if bench.small else "inductor"  # a CPU would compile for minutes
    if not blocks:
        module.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    try:
        if blocks:
            module.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
            run = module
        else:
            run = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
        made = step(run, given)
        bench.wait()
        seconds = round(time.perf_counter() - start, 1)
        found = speed(bench, work, bench.milliseconds(lambda: step(run, given)), size)
        furthest_off = float((made.float() - wanted.float()).abs().max())
        found |= {"compile_seconds": seconds, "largest_difference": round(furthest_off, 5)}
        if loaded.name == "sd15" if bench.small else bench.left() > 20 and not blocks:
            found["vae"] = compiled_vae(bench, loaded, size, latents, plain, backend)
        save_artifacts(bench)
        return found
    finally:
        module.to(memory_format=torch.contiguous_format)
        for part in module.modules():
            part._compiled_call_impl = None
        torch.compiler.reset()


def compiled_vae(
    bench: Bench, loaded: Loaded, size: int, latents: Any, plain: Any, backend: str
) -> dict[str, Any]:
    """The VAE's decode compiled in place, called by batchgen's decoder."""
    vae = loaded.decode.pipeline.vae
    decode, stage = vae.decode, loaded.at(size).decode
    start = time.perf_counter()
    try:
        vae.decode = torch.compile(decode, fullgraph=True, dynamic=False, backend=backend)
        pixels = stage(latents).pixels
        seconds = round(time.perf_counter() - start, 1)
        took = bench.milliseconds(lambda: stage(latents))
        return {
            "ms_an_image": round(took / size, 3),
            "compile_seconds": seconds,
            "levels_from_eager": furthest(pixels, plain),
        }
    finally:
        del vae.decode


def save_artifacts(bench: Bench) -> None:
    """What was compiled, for a new process to load."""
    saved = torch.compiler.save_cache_artifacts()
    if saved is not None:
        (bench.work / ARTIFACTS).write_bytes(saved[0])


def warm_elsewhere(bench: Bench) -> Any:
    """``warm`` in a new process, which has no other caches than the saved artifacts."""
    if bench.small:
        return warm(bench)
    return bench.elsewhere("warm", 60, {"TORCHINDUCTOR_CACHE_DIR": str(bench.work / "no-cache")})


def warm(bench: Bench) -> dict[str, Any]:
    """In a new process: compile again, with the saved artifacts. Returns the seconds it takes."""
    start = time.perf_counter()
    path = bench.work / ARTIFACTS
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())
    read = time.perf_counter() - start
    loaded = load(bench, "sd15", 8)
    size = 2 if bench.small else 8
    given = inputs(bench, loaded, size)
    module = loaded.denoiser.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    backend = "eager" if bench.small else "inductor"
    step(torch.compile(module, fullgraph=True, dynamic=False, backend=backend), given)
    bench.wait()
    mib = path.stat().st_size / (1 << 20) if path.exists() else 0.0
    return {
        "artifacts_mib": round(mib, 2),
        "read_seconds": round(read, 2),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def float8(bench: Bench, loaded: Loaded, size: int) -> dict[str, Any] | str:
    """Linear layers in FP8 with one scale a row (torchao), which no neighbour can change."""
    if TORCHAO_AT in os.environ:
        sys.path.append(os.environ[TORCHAO_AT])
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        return f"skipped: {error}"
    if not bench.cuda:
        return "skipped: a CPU has no FP8 matrix units"
    given = inputs(bench, loaded, size)
    wanted = step(loaded.denoiser, given).float()
    work = teraflop(loaded.denoiser, given)
    quantize_(loaded.denoiser, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    made = step(loaded.denoiser, given).float()
    noise = (made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    moved = _moved(given)
    other = step(loaded.denoiser, moved).float()
    same = torch.equal(other[0], made[0])
    took = bench.milliseconds(lambda: step(loaded.denoiser, given))
    found = {**speed(bench, work, took, size), "relative_error": round(float(noise), 5)}
    return {**found, "first_row_with_other_neighbours": "equal" if same else "other bytes"}


def _moved(given: Arguments) -> Arguments:
    """The same first row, with other neighbours: all other rows of the latents are negated."""
    (latents, *rest), kwargs = given
    other = -latents
    other[0] = latents[0]
    return (other, *rest), kwargs


def offloaded(bench: Bench, loaded: Loaded, size: int) -> dict[str, Any] | str:
    """Blocks in host memory, copied ahead on a side stream: for cards that are too small."""
    if not bench.cuda:
        return "skipped: a CPU has nothing to offload to"
    given = inputs(bench, loaded, size)
    module = loaded.denoiser
    start = time.perf_counter()
    module.enable_group_offload(
        onload_device=torch.device(bench.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    seconds = round(time.perf_counter() - start, 2)
    bench.free()
    took = bench.milliseconds(lambda: step(module, given), most=3)
    peak = bench.peak_gib(lambda: step(module, given))
    return {"ms": round(took, 2), "peak_gib": peak, "set_up_seconds": seconds}
