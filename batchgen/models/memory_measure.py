"""Measures a model's memory: runs its stages on the meta device and counts the living tensors.

``python -m batchgen.models.memory_measure`` reads a model's facts, a spec and a call as JSON, and
prints the need as JSON (see ``batchgen.models.memory``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from batchgen.errors import BatchgenError, ModelError, to_facts
from batchgen.families import family_named
from batchgen.models.load import META, load_decoder, load_denoiser, load_encoder
from batchgen.models.memory import STAGES, MemoryNeed, StageNeed
from batchgen.models.memory_trace import Shapes, Trace, Unread, counting
from batchgen.models.offload import bytes_of, parts_of, tensors_of
from batchgen.models.quantize import bits_of, is_left_out
from batchgen.records import Call, ConditionBatch, ModelInfo, Sample, call_from_json, tupled
from batchgen.spec.build import stored
from batchgen.spec.model import Model
from batchgen.spec.places import reach_stores
from batchgen.spec.spec import Spec
from batchgen.stages.encode import CACHE_BYTES

SIZES = (2, 4)  # batch sizes that are measured; the need of others lies on the line through them
WORDS = 600  # of a prompt: more than any text encoder reads; some families' calls grow with it


def measure(info: ModelInfo, spec: Spec, call: Call) -> MemoryNeed:
    """Measure the need of a model's stages; see ``memory.need_of``.

    Raises:
        ModelError: the model cannot be loaded or run without weights.
    """
    stages: dict[str, Any] = {
        "encode": load_encoder(info, spec, META),
        "denoise": load_denoiser(info, spec, META),
        "decode": load_decoder(info, spec, META),
    }
    call = shortened(info, call, spec.sampling.approximate.cycle)
    try:
        shapes = Shapes()
        small, large = (
            _calls(stages, batch_of(info, spec, call, size), size, shapes) for size in SIZES
        )
    except Unread as error:
        raise ModelError(
            f"model {info.model_id}: its memory cannot be computed, since a {info.family} model "
            "reads a number that depends on its weights"
        ) from error
    needs = {}
    for name, stage in stages.items():
        each = (large[name] - small[name]) // (SIZES[1] - SIZES[0])
        weights = sum(_sizes(weights_of(stage)).values()) - _saved(stage, spec.model)
        fixed = small[name] - SIZES[0] * each
        needs[name] = StageNeed(weights, fixed, each, *_if_offloaded(stage, info, spec))
    reads = any(
        getattr(stages["encode"].adapter, name) is not None
        for name in ("encode_prompt", "encode_label")
    )
    return MemoryNeed(needs, CACHE_BYTES if reads else 0)


def _calls(
    stages: Mapping[str, Any], batch: ConditionBatch, size: int, shapes: Shapes
) -> dict[str, int]:
    """Run the stages once; returns the largest sum of tensors besides the weights, of each."""
    found: dict[str, int] = {}
    given: Any = batch
    held: list[torch.Tensor] = []
    for name in STAGES:
        stage = stages[name]
        stage.batch_size = size
        weights = list(weights_of(stage))
        before = Trace(weights).live
        with counting([*weights, *held], shapes) as trace:
            given = stage(given)
        found[name] = trace.peak - before
        held += results_of(given)
    return found


def results_of(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a stage's result that are on its device."""
    for name in ("prompts", "conditions"):
        yield from getattr(result, name, {}).values()
    if hasattr(result, "latents"):
        yield result.latents


def _if_offloaded(stage: Any, info: ModelInfo, spec: Spec) -> tuple[int, int, int]:
    """Bytes of weights that can be offloaded; then on the device at a time, and on the host."""
    family = family_named(spec.task, info.family)
    seconds = (getattr(stage.pipeline, name, None) for name, _ in family.pipelines)
    pipelines = [*filter(None, seconds), stage.pipeline]
    parts = list(parts_of(pipelines, family.vae))
    movable = bytes_of(tensor for part in parts for tensor in tensors_of(part.module))
    window = max((part.window_bytes() for part in parts), default=0)
    return movable, window, sum(part.host_bytes() for part in parts)


def weights_of(stage: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of a stage's models."""
    parts = list(vars(stage.pipeline).values())
    parts += [
        one for part in parts if hasattr(part, "components") for one in part.components.values()
    ]
    for part in parts:
        if isinstance(part, torch.nn.Module):
            yield from part.parameters()
            yield from part.buffers()


def _saved(stage: Any, model: Model) -> int:
    """Bytes that quantization saves; components are not quantized on the meta device."""
    asked = model.quantization
    if asked is None:
        return 0
    saved = 0.0
    for path in asked.components:
        for name, module in _modules(stage.pipeline, path):
            if isinstance(module, torch.nn.Linear) and not is_left_out(asked, name):
                weight = module.weight
                saved += weight.nbytes - weight.numel() * bits_of(asked) / 8
    return int(saved)


def _modules(pipeline: Any, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield name and module of all layers of a component, or none if the stage does not hold it."""
    for name in path.split("."):
        pipeline = getattr(pipeline, name, None)
    if isinstance(pipeline, torch.nn.Module):
        yield from pipeline.named_modules()


def _sizes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Storage -> its bytes; tensors may share a storage."""
    storages = (one.untyped_storage() for one in tensors)
    return {one._cdata: one.nbytes() for one in storages}


def shortened(info: ModelInfo, call: Call, least: int = 2) -> Call:
    """The call with as few steps as it allows: memory does not grow with more than ``least``."""
    steps = max(least, info.min_steps)
    if call.denoising_end is not None:  # both models need a step
        steps = max(steps, int(1 / (1 - call.denoising_end)) + 2)
    while call.strength is not None and int(steps * call.strength) < 1:
        steps += 1
    return replace(call, num_inference_steps=min(steps, call.num_inference_steps))


def batch_of(info: ModelInfo, spec: Spec, call: Call, size: int) -> ConditionBatch:
    """A micro-batch of black images and long prompts, which all differ."""
    width, height = call.width // info.upscale, call.height // info.upscale
    shapes = {
        part: (height, width) if part == "mask" else (height, width, 3) for part in spec.image_parts
    }
    samples = tuple(
        Sample(
            key=str(row),
            source_id=str(row),
            row=row,
            variant=0,
            seed=row,
            prompt=f"{size} {row}" + " word" * WORDS,
            negative_prompt=spec.sampling.negative_prompt,
            call=call,
            class_label=row % len(info.class_names) if info.class_names else None,
        )
        for row in range(size)
    )
    images = {
        part: tuple(np.zeros(shape, np.uint8) for _ in samples) for part, shape in shapes.items()
    }
    return ConditionBatch(samples, images)


def main() -> None:
    """Answer the question on stdin."""
    asked = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        try:
            answer = asdict(_answer(asked))
        except BatchgenError as error:
            answer = to_facts(error)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = to_facts(ModelError(f"the model's memory cannot be computed: {said}"))
    print(json.dumps(answer))


def _answer(asked: Mapping[str, Any]) -> MemoryNeed:
    info = ModelInfo(**{name: tupled(value) for name, value in asked["info"].items()})
    spec = stored(asked["spec"])
    reach_stores(spec)
    return measure(info, spec, call_from_json(asked["call"]))


if __name__ == "__main__":
    main()
