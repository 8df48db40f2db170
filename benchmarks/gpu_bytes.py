"""Section 3: which circumstances change the bytes of a sample, with SD 1.5 at batch size 8."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from batchgen.records import ImageBatch
from batchgen.stages.decode import Decoder
from benchmarks.gpu_bench import GIB, Bench, furthest, sha
from benchmarks.gpu_stages import (
    THREADS,
    Loaded,
    batch,
    call,
    load,
    pixels_of,
    wired,
    wired_latents,
)

Pixels = np.ndarray[Any, Any]


def size_of(bench: Bench) -> int:
    return 4 if bench.small else 8


def steps_of(bench: Bench) -> int:
    return 2 if bench.small else 6


def same_bytes(bench: Bench) -> None:
    loaded = load(bench, "sd15", size_of(bench))
    count = size_of(bench)
    whole = run(bench, loaded, range(count))
    bench.note("first", {"sha": [sha(one) for one in whole], "load_seconds": loaded.seconds})
    for name, rows, places in (
        ("again", range(count), range(count)),
        ("other_places", [*range(1, count), 0], [*range(1, count), 0]),
        ("other_neighbours", [0, *range(20, 19 + count)], [0]),
        ("padded", range(3), range(3)),
    ):
        bench.measure(name, lambda rows=rows, at=places: compared(bench, loaded, rows, whole, at))
    bench.measure("new_process", lambda: elsewhere(bench, whole), needs_s=12)
    bench.measure("staged_wire", lambda: said(staged(bench, loaded), whole))
    bench.measure("two_threads", lambda: threads(bench, loaded, whole))
    bench.measure("busy_stream", lambda: busy(bench, loaded, whole))
    bench.measure("little_memory", lambda: tight(bench, loaded, whole))
    bench.measure("vae_one_by_one", lambda: vae_alone(bench, loaded))
    bench.measure("half_the_batch", lambda: halved(bench, loaded, whole))
    bench.measure("float32_tf32_or_ieee", lambda: precisions(bench, loaded))
    bench.measure("deterministic", lambda: deterministic(bench, whole), needs_s=12)


def run(bench: Bench, loaded: Loaded, rows: Sequence[int]) -> Pixels:
    shared = call(pixels_of(bench, "sd15"), steps_of(bench))
    images: ImageBatch = loaded.fused(batch(rows, shared))
    return images.pixels


def said(pixels: Pixels, wanted: Pixels) -> str:
    """``equal``, or how many samples differ and by how much at most."""
    unequal = [not np.array_equal(a, b) for a, b in zip(pixels, wanted, strict=True)]
    if not any(unequal):
        return "equal"
    return f"{sum(unequal)} of {len(unequal)} differ, by {furthest(pixels, wanted)} levels at most"


def compared(
    bench: Bench, loaded: Loaded, rows: Sequence[int], whole: Pixels, places: Sequence[int]
) -> str:
    """Rows in another order or company; ``places``: where each was in the first micro-batch."""
    return said(run(bench, loaded, rows)[: len(places)], whole[list(places)])


def fresh(bench: Bench) -> list[str]:
    """Digests of the first micro-batch, for another process to compare with."""
    count = size_of(bench)
    return [sha(one) for one in run(bench, load(bench, "sd15", count), range(count))]


def elsewhere(bench: Bench, whole: Pixels) -> str:
    return digests_said(bench.elsewhere("fresh", most_s=40), whole)


def digests_said(digests: Sequence[str], wanted: Pixels) -> str:
    unequal = sum(one != sha(pixels) for one, pixels in zip(digests, wanted, strict=True))
    return "equal" if unequal == 0 else f"{unequal} of {len(wanted)} differ"


def staged(bench: Bench, loaded: Loaded) -> Pixels:
    """With the results of encode and denoise as bytes on the way, as between pools."""
    shared = call(pixels_of(bench, "sd15"), steps_of(bench))
    encoded = loaded.encode(batch(range(size_of(bench)), shared))
    images: ImageBatch = loaded.decode(wired_latents(loaded.denoise(wired(encoded))))
    return images.pixels


def threads(bench: Bench, loaded: Loaded, whole: Pixels) -> str:
    """From threads of a pool that take turns on the device, as an actor's threads do."""
    lock, found = threading.Lock(), []

    def one() -> None:
        with lock:
            found.append(run(bench, loaded, range(size_of(bench))))

    started = [threading.Thread(target=one) for _ in range(THREADS)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    texts = [said(pixels, whole) for pixels in found]
    return "equal" if set(texts) == {"equal"} else "; ".join(texts)


def busy(bench: Bench, loaded: Loaded, whole: Pixels) -> str:
    """While a second stream multiplies matrices."""
    if not bench.cuda:
        return "skipped: a CPU has no streams"
    stop = threading.Event()

    def multiply() -> None:
        side = torch.cuda.Stream()
        matrix = torch.randn(2048, 2048, device=bench.device)
        with torch.cuda.stream(side):
            while not stop.is_set():
                matrix @ matrix
                side.synchronize()

    other = threading.Thread(target=multiply)
    other.start()
    try:
        return said(run(bench, loaded, range(size_of(bench))), whole)
    finally:
        stop.set()
        other.join()


@contextmanager
def ballast(bench: Bench, leave_gib: float) -> Iterator[None]:
    """Hold all of the device's memory except ``leave_gib``."""
    bench.free()
    free = torch.cuda.mem_get_info()[0] - int(leave_gib * GIB)
    held = torch.empty(max(1, free), dtype=torch.uint8, device=bench.device)
    try:
        yield
    finally:
        del held
        bench.free()


def tight(bench: Bench, loaded: Loaded, whole: Pixels) -> dict[str, str] | str:
    """With little free memory cuDNN may choose other kernels, which need less of it."""
    if not bench.cuda:
        return "skipped: only a GPU's memory is filled"
    found = {}
    for leave in (8.0, 4.0, 2.0):
        try:
            with ballast(bench, leave):
                found[f"{leave} GiB"] = said(run(bench, loaded, range(size_of(bench))), whole)
        except torch.OutOfMemoryError:
            found[f"{leave} GiB"] = "out of memory"
    return found


def deterministic(bench: Bench, whole: Pixels) -> str:
    """With only deterministic kernels allowed; an operation without one raises an error.

    In a new process, since cuBLAS reads its variable when CUDA starts.
    """
    setting = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found = strict(bench) if bench.small else bench.elsewhere("strict", 40, setting)
    return digests_said(found, whole)


def strict(bench: Bench) -> list[str]:
    torch.use_deterministic_algorithms(True)
    try:
        return fresh(bench)
    finally:
        torch.use_deterministic_algorithms(False)


def vae_alone(bench: Bench, loaded: Loaded) -> str:
    """The VAE on the complete batch against one call for each sample."""
    count = size_of(bench)
    latents = loaded.latents(batch(range(count), call(pixels_of(bench, "sd15"), 1)))
    single = Decoder(loaded.decode.pipeline, loaded.decode.adapter, 1)
    alone = [single(latents.take([place])).pixels[0] for place in range(count)]
    return said(np.stack(alone), loaded.decode(latents).pixels)


def halved(bench: Bench, loaded: Loaded, whole: Pixels) -> str:
    """Another batch size, which is not promised to give the same bytes."""
    half = size_of(bench) // 2
    return said(run(bench, loaded.at(half), range(half)), whole[:half])


def precisions(bench: Bench, loaded: Loaded) -> dict[str, Any]:
    """float32 with TF32 allowed nowhere, in convolutions (torch's default), everywhere."""
    wide = load(bench, "sd15", size_of(bench), model={"dtype": "float32"})
    found: dict[str, Any] = {}
    first: Pixels | None = None
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for name, conv, matmul in (
        ("ieee", False, False),
        ("tf32_conv", True, False),
        ("tf32_all", True, True),
    ):
        cudnn.allow_tf32, cuda.allow_tf32 = conv, matmul
        seconds, pixels = timed(bench, lambda: run(bench, wide, range(size_of(bench))))
        first = pixels if first is None else first
        found[name] = {"seconds": seconds, "against_ieee": said(pixels, first)}
    cudnn.allow_tf32, cuda.allow_tf32 = True, False
    seconds, pixels = timed(bench, lambda: run(bench, loaded, range(size_of(bench))))
    found[loaded.spec.model.dtype] = {"seconds": seconds, "against_ieee": said(pixels, first)}
    return found


def timed(bench: Bench, what: Callable[[], Pixels]) -> tuple[float, Pixels]:
    bench.wait()
    start = time.perf_counter()
    made = what()
    bench.wait()
    return round(time.perf_counter() - start, 3), made
