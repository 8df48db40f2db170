"""What counts as a lack of memory, and what a replica does about it."""

from __future__ import annotations

from typing import Any

import pytest

from batchgen.engine.memory import Memory, load_hint
from batchgen.errors import OutOfMemory
from batchgen.spec.sections import Resources
from batchgen.stages.out_of_memory import WORDINGS, is_out_of_memory
from tests.memory_errors import LACKING, OTHER


@pytest.mark.parametrize("name", LACKING)
def test_a_lack_of_memory_is_recognized(name: str) -> None:
    assert is_out_of_memory(LACKING[name])


@pytest.mark.parametrize("name", OTHER)
def test_other_errors_are_not_taken_for_one(name: str) -> None:
    assert not is_out_of_memory(OTHER[name])


@pytest.mark.parametrize("wording", WORDINGS)
def test_each_wording_counts_in_torchs_errors_only(wording: str) -> None:
    assert is_out_of_memory(RuntimeError(f"Before. {wording.upper()} after"))
    assert not is_out_of_memory(ValueError(wording))


def test_a_cause_counts() -> None:
    error = ValueError("the stage failed")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)
    error.__cause__ = error  # a circle ends
    assert not is_out_of_memory(error)


def short(batch_size: int = 8) -> Memory:
    return Memory(Resources(batch_size=batch_size), "cpu")


@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_a_stage_that_runs_out_of_memory_again_stops_the_job(stage: str) -> None:
    memory = short()
    error = OutOfMemory(stage, "OutOfMemoryError: CUDA out of memory")
    assert memory.ran_out(3, error, None) is None
    assert memory.ran_out(4, error, None) is None, "another shard has its own second try"
    stop = memory.ran_out(3, error, None)
    assert stop is not None and memory.decode_batch_size is None
    said = str(stop)
    assert f"too little memory to {stage} 8 images at a time" in said
    assert "CUDA out of memory" in said
    assert "lower resources.batch_size, for example to 4 (`--batch-size 4`)" in said


def test_the_decoder_is_given_less_at_once_before_the_job_stops() -> None:
    memory = short()
    error = OutOfMemory("decode", "OutOfMemoryError: CUDA out of memory")
    assert memory.ran_out(3, error, None) is None and memory.decode_batch_size == 1
    assert memory.ran_out(4, error, None) is None, "its attempt began before, with 8 images"
    assert memory.ran_out(3, error, 1) is None
    stop = memory.ran_out(3, error, 1)
    assert stop is not None and "decode 1 image at a time" in str(stop)
    assert "resources.vae_tiling: true" in str(stop) and "--batch-size" not in str(stop)


def test_one_image_that_does_not_fit_needs_another_model_or_device() -> None:
    memory = short(batch_size=1)
    error = OutOfMemory("denoise", "OutOfMemoryError")
    assert memory.ran_out(0, error, None) is None
    stop = memory.ran_out(0, error, None)
    assert stop is not None
    for remedy in ("even one image", "model.quantization", "16-bit model.dtype", "num_gpus"):
        assert remedy in str(stop)
    assert "--batch-size" not in str(stop)


STAGED = {"layout": "staged", "denoise": {"num_gpus": 2}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "[encode, denoise]"),
        ({"offload": ["decode", "denoise"]}, "[decode, denoise, encode]"),
        ({"offload": ["encode", "denoise"]}, ""),
        ({"generate": {"num_gpus": 2}}, ""),
        ({"generate": {"num_gpus": 0.5}}, "[encode, denoise]"),
        (STAGED, "[encode]"),
    ],
)
def test_a_gpu_that_is_too_small_can_have_weights_offloaded(
    fields: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is continued, since the field may change on resume."""
    monkeypatch.setattr("batchgen.engine.memory.memory_facts", lambda device: "")
    resources = Resources.model_validate({"batch_size": 1, **fields})
    error = OutOfMemory("denoise", "OutOfMemoryError")
    for device, hint in (("cuda:0", f"resources.offload: {told}" if told else ""), ("cpu", "")):
        memory = Memory(resources, device)
        memory.ran_out(0, error, None)
        said = str(memory.ran_out(0, error, None))
        loading = load_hint(resources, device)
        if hint:
            assert f"does not fit. Continue this output with {hint}, which keeps weights" in said
            assert loading.startswith(f"use {hint}, which keeps weights in host memory; or a ")
        else:
            assert "offload" not in said + loading and "does not fit. Use a GPU" in said
        assert loading.endswith("several GPUs a replica (num_gpus)") == (device == "cuda:0")
