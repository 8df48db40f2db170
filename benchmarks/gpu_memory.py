"""Section 9: what running out of memory looks like, and what is left of the process after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from batchgen.records import LatentBatch
from benchmarks.gpu_bench import GIB, Bench, sha
from benchmarks.gpu_stages import Loaded, batch, call, load, pixels_of

TOO_MANY = (64, 128, 256)


def memory(bench: Bench) -> None:
    loaded = load(bench, "sdxl", 2 if bench.small else 8)
    bench.note("load_seconds", loaded.seconds)
    size = loaded.denoise.batch_size
    latents = loaded.latents(batch(range(size), call(pixels_of(bench, "sdxl"), 1)))
    before = sha(loaded.decode(latents).pixels)
    bench.note("memory_before_gib", held(bench))
    bench.measure("decode", lambda: too_much(bench, loaded, latents))
    bench.note("memory_after_gib", held(bench))
    bench.measure(
        "decode_after_it",
        lambda: "equal" if sha(loaded.decode(latents).pixels) == before else "other bytes",
    )
    bench.measure("full_card", lambda: full(bench), needs_s=12)


def held(bench: Bench) -> dict[str, float] | None:
    if not bench.cuda:
        return None
    return {
        "allocated": round(torch.cuda.memory_allocated() / GIB, 2),
        "reserved": round(torch.cuda.memory_reserved() / GIB, 2),
        "free": round(torch.cuda.mem_get_info()[0] / GIB, 2),
    }


def too_much(bench: Bench, loaded: Loaded, latents: LatentBatch) -> dict[str, Any]:
    """Decode ever more images at once, until it fails; on a CPU ask for a petabyte instead."""
    if not bench.cuda:
        return raised(lambda: torch.empty(1 << 50, dtype=torch.uint8))
    for count in TOO_MANY:
        shape = (count, *latents.latents.shape[1:])
        many = torch.randn(shape, device=bench.device, dtype=latents.latents.dtype)
        found = raised(
            lambda m=many, c=count: loaded.at(c).decode(LatentBatch(latents.call, m, (False,) * c))
        )
        if found["class"] is not None:
            return {"images": count, **found}
    return {"images": TOO_MANY[-1], "class": None}


def raised(what: Callable[[], Any]) -> dict[str, Any]:
    """The class of the exception, with those it derives from, and its text."""
    try:
        what()
    except Exception as error:
        kinds = [one.__name__ for one in type(error).__mro__ if one not in (object, BaseException)]
        text = re.sub(r"\s+", " ", str(error))
        return {"class": kinds[0], "bases": kinds[1:-1], "text": text[:400]}
    return {"class": None}


def full(bench: Bench) -> Any:
    return full_card(bench) if bench.small else bench.elsewhere("full_card", 40)


def full_card(bench: Bench) -> dict[str, Any]:
    """In a new process whose card is full before the first product: each library's own error."""
    if not bench.cuda:
        return {"too_large": raised(lambda: torch.empty(1 << 50, dtype=torch.uint8))}
    left, image = (torch.randn(64, 64, device=bench.device) for _ in range(2))
    query = torch.randn(1, 8, 64, 40, device=bench.device, dtype=torch.bfloat16)
    pictures = torch.randn(8, 64, 64, 64, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(64, 64, 3, 3, device=bench.device, dtype=torch.bfloat16)
    balls = []
    for part in (GIB, GIB >> 6, GIB >> 10):
        while True:
            try:
                balls.append(torch.empty(part, dtype=torch.uint8, device=bench.device))
            except torch.OutOfMemoryError:
                break
    found = {
        "matmul": raised(lambda: left @ image),
        "conv": raised(lambda: functional.conv2d(pictures, weight, padding=1)),
        "attention": raised(lambda: functional.scaled_dot_product_attention(query, query, query)),
    }
    return {**found, "filled_gib": round(sum(one.nbytes for one in balls) / GIB, 2)}
