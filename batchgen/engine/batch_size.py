"""Chooses the sizes of calls for the memory of a GPU (``resources.batch_size: auto``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.errors import ModelError
from batchgen.families import family_named
from batchgen.models.memory import FUSED, MemoryNeed, fits, largest_batch, need_of
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.plan.choices import chosen, with_choices
from batchgen.records import DeviceInfo, ModelInfo
from batchgen.spec.model import AUTO
from batchgen.spec.sections import Resources
from batchgen.spec.spec import Spec

SHARES = {"encode": 0.1, "denoise": 0.8, "decode": 0.1}  # num_gpus of the pools by default

# Pixels in a call from which on a large GPU generates hardly more images a second. Larger calls
# only cost memory, and shards whose last micro-batch is mostly padding.
ENOUGH_PIXELS = {"unet": 32 * 512 * 512, "transformer": 2 * 1024 * 1024}


@dataclass(frozen=True)
class Group:
    """Stages whose replicas share GPUs: one replica of each, on ``gpus`` GPUs."""

    stages: tuple[str, ...]
    gpus: float


def groups_of(resources: Resources) -> list[Group]:
    """Group the stages as a run places them: those with a fraction of a GPU share one."""
    if resources.layout == "fused":
        share = resources.generate.num_gpus
        return [Group((FUSED,), 1.0 if share is None else share)]
    pools = {"encode": resources.encode, "denoise": resources.denoise, "decode": resources.decode}
    shares = {
        name: SHARES[name] if pool.num_gpus is None else pool.num_gpus
        for name, pool in pools.items()
    }
    small = {name: share for name, share in shares.items() if share < 1}
    if sum(small.values()) > 1:
        return [Group((name,), share) for name, share in shares.items()]
    own = [Group((name,), share) for name, share in shares.items() if share >= 1]
    return [*own, *([Group(tuple(small), 1.0)] if small else [])]


def largest(
    need: MemoryNeed, groups: Sequence[Group], gpu_bytes: int, decode_size: int | None = None
) -> int:
    """The largest batch size that fits the GPUs of each group; 0 if none does."""
    return min(
        largest_batch(need, one.gpus * gpu_bytes, stages=one.stages, decode_size=decode_size)
        for one in groups
    )


def sized(spec: Spec, model: ModelInfo, device: DeviceInfo | None) -> tuple[Spec, tuple[str, ...]]:
    """The spec with sizes of calls for the GPU, if its batch size is ``auto``.

    It stays ``auto`` for a CPU, for a GPU whose memory is not known, and for a model whose need
    cannot be computed: there planning takes the usual size. Also returns what to tell about that.

    Raises:
        SpecError: a setting that the model does not support.
    """
    if spec.resources.batch_size != AUTO or device is None or not device.memory_bytes:
        return spec, ()
    planned = chosen(settle(spec, model), device)
    try:
        need = need_of(model, planned, usual_call(planned, model))
    except ModelError as error:
        usual = spec.resources.micro_batch
        return spec, (f"resources.batch_size: auto is {usual} for this output, since {error}",)
    groups = [one for one in groups_of(spec.resources) if one.gpus]
    batch, decode = sizes_for(need, groups, device.memory_bytes, most_for(planned, model))
    asked = spec.resources.decode_batch_size
    if asked is not None:
        batch, decode = max(batch, asked), asked
    decode_size = None if decode == batch else decode
    return with_choices(spec, spec.model.dtype, batch, decode_size), ()


def most_for(planned: Spec, model: ModelInfo) -> int:
    """The batch size above which a GPU generates hardly faster, and no more than a shard needs.

    Of the batch sizes with the same number of micro-batches in a shard it is the smallest one.
    """
    call, shard = usual_call(planned, model), planned.output.samples_per_shard
    parts = family_named(planned.task, model.family).denoiser
    enough = ENOUGH_PIXELS["transformer" if "transformer" in parts else "unet"]
    most = min(shard, max(1, enough // (call.width * call.height)))
    return -(-shard // -(-shard // most))


def sizes_for(
    need: MemoryNeed, groups: Sequence[Group], gpu_bytes: int, most: int
) -> tuple[int, int]:
    """The largest batch size up to ``most`` that fits, and the largest decode size with it.

    The decoder's memory alone does not lower the batch size: it can decode in several calls. If
    nothing fits, both are 1.
    """
    batch = max(1, min(most, largest(need, groups, gpu_bytes, decode_size=1)))
    fitting = (
        size
        for size in range(batch, 1, -1)
        if all(fits(need, one.gpus * gpu_bytes, one.stages, batch, size) for one in groups)
    )
    return batch, next(fitting, 1)
