"""Decides how a replica that ran out of memory continues: retry, decode less at once, or stop."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from dataclasses import dataclass, field

from batchgen.errors import DoesNotFit, OutOfMemory
from batchgen.spec.sections import Resources

GIB = 1 << 30
TRIES = 2  # at a stage of a shard: the second one with an empty cache


@dataclass
class Memory:
    """What a replica knows about its memory.

    A stage's calls have one fixed size, so running out of memory says nothing about the samples.
    The first time, the attempt is repeated with an empty cache. If the decoder ran out of memory,
    this replica decodes one image at a time from then on. If that does not help, or another stage
    runs out of memory twice on a shard, no other shard would fit either.

    Attributes:
        resources: sizes of the calls as planned.
        device: the torch device of the replica's models.
        decode_batch_size: number of samples in each call of the decoder; None: the planned number.
    """

    resources: Resources
    device: str
    decode_batch_size: int | None = None
    _failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    _is_short: bool = False

    def ran_out(self, shard: int, error: OutOfMemory, tried: int | None) -> DoesNotFit | None:
        """Record that a stage ran out of memory; returns the error that should stop the job.

        ``tried`` is the ``decode_batch_size`` of that attempt, which may have begun before another
        thread's shard lowered it.
        """
        self._is_short = True
        decode = tried or self.resources.decode_size
        if error.stage == "decode" and decode > 1:
            self.decode_batch_size = 1
            return None
        self._failures[shard, error.stage] += 1
        if self._failures[shard, error.stage] < TRIES:
            return None
        size = 1 if error.stage == "decode" else self.resources.micro_batch
        return DoesNotFit(
            f"{os.uname().nodename} has too little memory to {error.stage} {_images(size)} at a "
            f"time{memory_facts(self.device)}: it ran out of memory again after its cache was "
            f"cleared ({error}); {_remedy(size, error.stage, self._hint())}"
        )

    def _hint(self) -> str:
        return offload_hint(self.resources) if self.device.startswith("cuda") else ""

    def free(self) -> None:
        """Clear torch's cache of device memory, if memory was lacking since the last call.

        Call it when no error is being handled: a traceback keeps the tensors of its frames.
        """
        if not self._is_short:
            return
        self._is_short = False
        clear_cache()


def clear_cache() -> None:
    """Return to the device what torch keeps of its memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_facts(device: str) -> str:
    """The device's memory in words, for a message; empty for a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return (
        f" (GPU {torch.cuda.get_device_name(device)}: this process used up to {peak / GIB:.1f} of "
        f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB are free)"
    )


def _images(size: int) -> str:
    return "1 image" if size == 1 else f"{size} images"


def not_offloaded(resources: Resources) -> tuple[str, ...]:
    """Stages whose weights could be kept in host memory, and are not.

    The decoder's are few: less than those of a text encoder.
    """
    pools = {stage: resources.pool_of(stage)[1] for stage in ("encode", "denoise")}
    return tuple(
        stage
        for stage, pool in pools.items()
        if stage not in resources.offload and (pool.num_gpus or 1) <= 1
    )


def offload_hint(resources: Resources) -> str:
    """How to offload what is not offloaded, as a part of a sentence; empty if all is."""
    more = not_offloaded(resources)
    stages = ", ".join((*resources.offload, *more))
    return f"resources.offload: [{stages}], which keeps weights in host memory" if more else ""


def load_hint(resources: Resources, device: str) -> str:
    """What to do if the weights do not fit on a device; empty for a CPU."""
    if not device.startswith("cuda"):
        return ""
    offload = offload_hint(resources)
    others = "a smaller model.dtype, model.quantization, or several GPUs a replica (num_gpus)"
    return f"use {offload}; or {others}" if offload else f"use {others}"


def _remedy(size: int, stage: str, offload: str) -> str:
    """What fits more likely. Settings other than the calls' sizes and offload need a new output."""
    if size > 1:
        less = size // 2
        return f"lower resources.batch_size, for example to {less} (`--batch-size {less}`)"
    tiling = "resources.vae_tiling: true, " if stage == "decode" else "model.quantization, "
    continued = f"Continue this output with {offload}; or " if offload else ""
    use = "use" if offload else "Use"
    return (
        f"even one image does not fit. {continued}{use} a GPU with more memory, or write to a new "
        f"output with {tiling}a 16-bit model.dtype, a smaller width and height, or several GPUs "
        "for each replica (num_gpus of its pool)"
    )
