"""Section 0: the device, its versions, and the ceilings that later sections are compared with."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as functional

from benchmarks.gpu_bench import GIB, Bench

PACKAGES = ("torch", "diffusers", "transformers", "triton", "torchao", "pyarrow", "isal", "numpy")
ATTENTION = ((16, 8, 4096, 40), (16, 10, 4096, 64), (1, 24, 4608, 128), (8, 1, 16384, 512))
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,pcie.link.gen.max"


def machine(bench: Bench) -> None:
    bench.note("host", host())
    bench.note("device", device(bench))
    bench.measure("settings", settings)
    bench.measure("matmul_tflops", lambda: matmuls(bench))
    bench.measure("attention", lambda: attention(bench))
    bench.measure("conv_tflops", lambda: convolutions(bench))
    bench.measure("group_norm_gb_s", lambda: group_norms(bench))
    bench.measure("copy_gb_s", lambda: copies(bench))


def host() -> dict[str, Any]:
    import os

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    found["cpus"] = len(os.sched_getaffinity(0))
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device(bench: Bench) -> dict[str, Any]:
    if not bench.cuda:
        return {"name": f"CPU {torch.backends.cpu.get_cpu_capability()}"}
    facts = torch.cuda.get_device_properties(bench.device)
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=10,
    )
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / GIB, 1),
        "free_gib": round(torch.cuda.mem_get_info()[0] / GIB, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": dict(zip(QUERY.split(","), asked.stdout.strip().split(", "), strict=False)),
    }


def settings() -> dict[str, Any]:
    """What torch does by default, and which order of attention backends it has."""
    order = torch._C._get_sdp_priority_order()
    return {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_conv": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "attention_order": [backend(one) for one in order],
    }


def backend(number: int) -> str:
    from torch.nn.attention import SDPBackend

    names = {int(one): name for name, one in SDPBackend.__members__.items()}
    return names.get(int(number), str(number)).removesuffix("_ATTENTION").lower()


def drawn(bench: Bench, *shape: int, dtype: Any = torch.bfloat16) -> torch.Tensor:
    """Random numbers; zeros would be quicker to multiply."""
    return torch.randn(shape, device=bench.device).to(dtype)


def matmuls(bench: Bench) -> dict[str, Any]:
    size = 256 if bench.small else 8192
    found: dict[str, Any] = {"size": size}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        left, right = drawn(bench, size, size, dtype=dtype), drawn(bench, size, size, dtype=dtype)
        found[name] = rate(bench, 2 * size**3, lambda a=left, b=right: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = False
    found["float8_rows"] = attempt(lambda: float8(bench, size))
    return found


def rate(bench: Bench, operations: float, what: Callable[[], Any]) -> float:
    """TFLOP/s."""
    return round(operations / bench.milliseconds(what, spend_s=0.3) / 1e9, 3)


def attempt(what: Callable[[], Any]) -> Any:
    """The result, or the error in one line: this part may be missing on a device."""
    try:
        return what()
    except Exception as error:
        return f"no: {type(error).__name__}: {str(error).splitlines()[0][:100]}"


def float8(bench: Bench, size: int) -> float:
    """One scale a row of the left matrix and a column of the right one."""
    left = drawn(bench, size, size).to(torch.float8_e4m3fn)
    right = drawn(bench, size, size).to(torch.float8_e4m3fn).t()
    rows = torch.ones(size, 1, device=bench.device)
    columns = torch.ones(1, size, device=bench.device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            left,
            right,
            scale_a=rows,
            scale_b=columns,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return rate(bench, 2 * size**3, product)


def attention(bench: Bench) -> dict[str, Any]:
    """For the shapes of SD 1.5, SDXL, Flux and a VAE: the backend that torch takes, and TFLOP/s."""
    found = {}
    for shape in ((1, 2, 64, 16),) if bench.small else ATTENTION:
        rows, heads, tokens, width = shape
        query, key, value = (drawn(bench, *shape) for _ in range(3))
        operations = 4 * rows * heads * tokens**2 * width
        chosen = torch._fused_sdp_choice(query, key, value)
        found[str(shape)] = {
            "backend": backend(chosen),
            "tflops": rate(
                bench,
                operations,
                lambda q=query, k=key, v=value: functional.scaled_dot_product_attention(q, k, v),
            ),
        }
    return found


def convolutions(bench: Bench) -> dict[str, Any]:
    """3 x 3, in both memory formats: batch 16, (channels, side)."""
    found: dict[str, Any] = {}
    for channels, side in ((8, 8),) if bench.small else ((320, 64), (1280, 16)):
        image, weight = (
            drawn(bench, 16, channels, side, side),
            drawn(bench, channels, channels, 3, 3),
        )
        operations = 2 * 16 * channels**2 * side**2 * 9
        for name, order in FORMATS.items():
            x, w = image.to(memory_format=order), weight.to(memory_format=order)
            found[f"{channels}@{side} {name}"] = rate(
                bench, operations, lambda x=x, w=w: functional.conv2d(x, w, padding=1)
            )
    return found


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def group_norms(bench: Bench) -> dict[str, Any]:
    """GB/s, of bytes read and written once."""
    found = {}
    shape = (2, 32, 8, 8) if bench.small else (16, 320, 64, 64)
    for name, order in FORMATS.items():
        image = drawn(bench, *shape).to(memory_format=order)
        took = bench.milliseconds(lambda x=image: functional.group_norm(x, 32), spend_s=0.2)
        kept = functional.group_norm(image, 32).is_contiguous(memory_format=order)
        found[name] = {"gb_s": round(2 * image.nbytes / took / 1e6, 1), "keeps_format": kept}
    return found


def copies(bench: Bench) -> dict[str, float]:
    """GB/s: on the device (bytes read and written), and from and to pageable and pinned memory."""
    count = (1 << 20) if bench.small else (1 << 28)
    there = torch.randint(0, 255, (count,), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(there)
    pageable = torch.empty(count, dtype=torch.uint8)
    pageable.fill_(1)
    ways: dict[str, Callable[[], Any]] = {
        "pageable_to_device": lambda: there.copy_(pageable),
        "device_to_pageable": lambda: pageable.copy_(there),
    }
    if bench.cuda:
        pinned = pageable.pin_memory()
        ways["pinned_to_device"] = lambda: there.copy_(pinned, non_blocking=True)
        ways["device_to_pinned"] = lambda: pinned.copy_(there, non_blocking=True)
    found = {
        name: round(count / bench.milliseconds(way, spend_s=0.2, most=5) / 1e6, 1)
        for name, way in ways.items()
    }
    took = bench.milliseconds(lambda: other.copy_(there), spend_s=0.2)
    return {"device_to_device": round(2 * count / took / 1e6, 1), **found}
