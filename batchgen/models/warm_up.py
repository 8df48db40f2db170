"""Runs a replica's stages once in every planned shape, so that their code is compiled before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from batchgen.models.artifacts import Compiled, warmed
from batchgen.models.compiling import compile_errors
from batchgen.models.load import META, load_denoiser, load_encoder
from batchgen.models.memory_measure import batch_of, shortened
from batchgen.models.memory_trace import counting
from batchgen.records import Call, EncodedBatch, LatentBatch, ModelInfo
from batchgen.spec.spec import Spec


def warm_up(
    info: ModelInfo, spec: Spec, calls: Sequence[Call], stages: Mapping[str, Any]
) -> Compiled:
    """Run each call once, with invented samples, through the stages that a replica holds.

    Args:
        info: the model as planned.
        spec: as planned; ``resources.compile`` is set.
        calls: calls of all planned shapes; their numbers of steps do not matter.
        stages: those of ``encode``, ``denoise`` and ``decode`` that the replica holds.

    Raises:
        ModelError: torch cannot compile the model.
        StorageFailed: the place of shared code cannot be read.
    """
    calls = [shortened(info, call) for call in calls]

    def run() -> None:
        with compile_errors(f"a {info.family} model"):
            for call in calls:
                _run(info, spec, call, stages)

    resources = spec.resources
    sizes = (resources.micro_batch, resources.decode_size, resources.torch_threads)
    facts = {
        "task": spec.task,
        "weights": info.manifest_sha256,
        "model": spec.model.model_dump(mode="json"),
        "compile": (resources.compile, resources.vae_tiling, *sizes),
        "calls": [asdict(call) for call in calls],
        "stages": sorted(stages),
    }
    held = next(one for name, one in stages.items() if name != "encode")
    return warmed(facts, str(held.pipeline.device), run)


def _run(info: ModelInfo, spec: Spec, call: Call, stages: Mapping[str, Any]) -> None:
    batch = batch_of(info, spec, call, spec.resources.micro_batch)
    if "encode" in stages:
        encoded = stages["encode"](batch)
    else:
        encoded = _invented(info, spec, batch, decoded="denoise" not in stages)
    latents = stages["denoise"](encoded) if "denoise" in stages else encoded
    if "decode" in stages:
        stages["decode"](latents)


def _invented(info: ModelInfo, spec: Spec, batch: Any, decoded: bool) -> Any:
    """What the earlier pools of the staged layout would send, with zeros for numbers.

    They are run on the meta device, where tensors have shapes but no memory.
    """
    with counting(()):
        given: Any = load_encoder(info, spec, META)(batch)
        if decoded:
            given = load_denoiser(info, spec, META)(given)
    if isinstance(given, LatentBatch):
        return LatentBatch(given.call, _zeros(given.latents), given.truncated)
    assert isinstance(given, EncodedBatch)
    return EncodedBatch(
        call=given.call,
        prompts={name: _zeros(one) for name, one in given.prompts.items()},
        prompt_index=given.prompt_index,
        negative_index=given.negative_index,
        conditions={name: _zeros(one) for name, one in given.conditions.items()},
        labels=given.labels,
        generator_states=given.generator_states,
        truncated=given.truncated,
    )


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape on the CPU, where tensors arrive between pools."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
