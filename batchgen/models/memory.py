"""How much device memory a model needs, by stage and batch size, computed without its weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from batchgen import __version__
from batchgen.errors import ModelError, from_facts
from batchgen.records import Call, ModelInfo
from batchgen.spec.spec import Spec
from batchgen.storage.cache import cache_folder

STAGES = ("encode", "denoise", "decode")
FUSED = "fused"  # all stages in one process
HEADROOM = 0.1  # fraction of a device's memory that stays free, see ``largest_batch``
MAX_BATCH = 1024  # that of ``resources.batch_size``
WITHIN_S = 300.0
MEASURE = "batchgen.models.memory_measure"
LAYOUT = 2  # of a kept need: earlier ones know nothing of offloading


@dataclass(frozen=True)
class StageNeed:
    """Bytes of device memory that one stage needs.

    Attributes:
        weight_bytes: parameters and buffers.
        fixed_bytes: the part of a call's tensors that does not depend on the batch size.
        image_bytes: what each image of a micro-batch adds to the call's tensors.
        movable_bytes: those of the weights that can be offloaded (``resources.offload``).
        window_bytes: if they are, the most of them that are on the device at a time.
        host_bytes: if they are, the host memory that they take.
    """

    weight_bytes: int
    fixed_bytes: int
    image_bytes: int
    movable_bytes: int = 0
    window_bytes: int = 0
    host_bytes: int = 0

    def call_bytes(self, batch_size: int) -> int:
        """The largest sum of the tensors that are alive at one time during a call."""
        return self.fixed_bytes + self.image_bytes * batch_size

    def offloaded(self) -> StageNeed:
        """The need if the stage is offloaded; a call's tensors then include weights."""
        return replace(
            self,
            weight_bytes=self.weight_bytes - self.movable_bytes,
            fixed_bytes=self.fixed_bytes + self.window_bytes,
        )


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of device memory that a replica needs.

    Attributes:
        stages: ``encode``, ``denoise`` and ``decode``.
        cache_bytes: the largest size of the cache of encoded prompts.
        offload: names of the stages that are offloaded.
    """

    stages: Mapping[str, StageNeed]
    cache_bytes: int
    offload: tuple[str, ...] = ()

    def offloading(self, stages: Iterable[str]) -> MemoryNeed:
        """The need if these stages, and no others, are offloaded."""
        return replace(self, offload=tuple(stages))

    def _of(self, stage: str) -> Iterator[StageNeed]:
        for one in _stages(stage):
            need = self.stages[one]
            yield need.offloaded() if one in self.offload else need

    def weights(self, stage: str) -> int:
        """Bytes of the weights that one stage, or all (``fused``), keeps on the device."""
        return sum(one.weight_bytes for one in self._of(stage))

    def host(self, stage: str) -> int:
        """Bytes of the weights that one stage, or all (``fused``), keeps in host memory."""
        return sum(self.stages[one].host_bytes for one in _stages(stage) if one in self.offload)

    def peak(self, stage: str, batch_size: int, decode_size: int | None = None) -> int:
        """The most bytes that one stage needs at a time; ``fused``: all stages in one process.

        Stages run one after the other, so ``fused`` is all weights and the largest call. The
        decoder is called with ``decode_size`` images, by default with ``batch_size``.
        """
        names = _stages(stage)
        sizes = {"decode": decode_size or batch_size}
        needs = zip(names, self._of(stage), strict=True)
        calls = max(need.call_bytes(sizes.get(one, batch_size)) for one, need in needs)
        cache = self.cache_bytes if "encode" in names else 0
        return self.weights(stage) + cache + calls


def _stages(stage: str) -> Sequence[str]:
    return STAGES if stage == FUSED else (stage,)


def fits(
    need: MemoryNeed,
    memory_bytes: float,
    stages: Sequence[str],
    batch_size: int,
    decode_size: int | None = None,
    headroom: float = HEADROOM,
) -> bool:
    """Whether the stages fit into the memory together.

    Args:
        need: of the model, at one image size and dtype.
        memory_bytes: the memory that the replicas of these stages share.
        stages: names of stages, or ``fused``; one replica of each.
        batch_size: images in a call.
        decode_size: images in a call of the decoder; None: ``batch_size``.
        headroom: fraction of the memory to leave free: for the CUDA context and loaded kernels,
            the workspaces of cuDNN and cuBLAS, and gaps between the blocks of torch's allocator.
    """
    peak = sum(need.peak(stage, batch_size, decode_size) for stage in stages)
    return peak <= memory_bytes * (1 - headroom)


def largest_batch(
    need: MemoryNeed,
    memory_bytes: float,
    headroom: float = HEADROOM,
    stages: Sequence[str] = (FUSED,),
    decode_size: int | None = None,
) -> int:
    """The largest batch size with which the stages fit; 0 if none does. Arguments as of ``fits``.

    The decoder's calls are never larger than the batch size.
    """
    fitting = (
        size
        for size in range(MAX_BATCH, 0, -1)
        if fits(need, memory_bytes, stages, size, min(decode_size or size, size), headroom)
    )
    return next(fitting, 0)


def need_of(info: ModelInfo, spec: Spec, call: Call, within_s: float = WITHIN_S) -> MemoryNeed:
    """Compute the memory that a model needs for calls of this kind.

    A new Python process does it, since it loads torch, which the driver must not. It reads
    configurations and adapters, no weights. The result is kept in the download cache of model
    files, in ``memory/``.

    Args:
        info: the model as planned.
        spec: as planned: task, dtype, columns, the section ``model``, and what is offloaded.
        call: gives the size of the images, guidance and scheduler.
        within_s: the most seconds to wait for it.

    Raises:
        ModelError: it cannot be computed for this model, or takes too long.
    """
    asked = {"info": asdict(info), "spec": spec.model_dump(mode="json"), "call": asdict(call)}
    place = cache_folder() / "memory" / f"{_key(info, spec, call)}.json"
    offload = spec.resources.offload
    with suppress(OSError, ValueError, TypeError, KeyError):
        return read_need(json.loads(place.read_text())).offloading(offload)
    need = _measured(info, asked, within_s)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        written = place.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(asdict(need)))
        written.replace(place)
    return need.offloading(offload)


def _key(info: ModelInfo, spec: Spec, call: Call) -> str:
    """A hash over what the need depends on."""
    facts = [
        {name: version(name) for name in ("torch", "diffusers", "transformers")},
        __version__,
        LAYOUT,
        asdict(info),
        spec.task,
        spec.model.model_dump(mode="json"),
        spec.sampling.negative_prompt,
        spec.sampling.approximate.model_dump(mode="json"),
        sorted(spec.input.columns.mapped()),
        spec.resources.vae_tiling,
        asdict(call),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _measured(info: ModelInfo, asked: object, within_s: float) -> MemoryNeed:
    """Let a new process compute the need; see ``need_of``."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", MEASURE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=within_s,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"model {info.model_id}: computing its memory took longer than {within_s:.0f} s"
        ) from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ModelError(f"model {info.model_id}: its memory cannot be computed: {said}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise from_facts(answer)
    return read_need(answer)


def read_need(tree: Mapping[str, Any]) -> MemoryNeed:
    """Read a need from the JSON values of ``dataclasses.asdict``."""
    stages = {name: StageNeed(**one) for name, one in tree["stages"].items()}
    return MemoryNeed(stages, tree["cache_bytes"])
