"""The stages on real, tiny diffusers components: equal to the plain pipelines, row by row."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from batchgen import models
from batchgen.families.calls import unscaled
from batchgen.records import (
    Call,
    ConditionBatch,
    EncodedBatch,
    LatentBatch,
)
from batchgen.shard import tensor_bytes
from batchgen.stages.decode import to_bytes
from tests.tiny_models import build_model
from tests.tiny_stages import (
    TASKS,
    Stages,
    batch_of,
    furthest,
    plain,
    plain_pixels,
    stages,
)

# of numpy 2, said of schedulers' code in diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


# --- equal to the plain pipelines ----------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        None,  # the model's own: PNDM
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_pixels_equal_those_of_the_plain_pipeline(
    folder: Path, task: str, scheduler: str | None, guidance_scale: float
) -> None:
    batch = batch_of(task, [0, 1, 2], guidance_scale=guidance_scale)
    ours = stages(folder, task, scheduler)(batch).pixels
    pipeline = plain(folder, task, scheduler)
    assert ours.std() > 5
    assert np.array_equal(ours, plain_pixels(pipeline, batch, from_embeds=True))
    assert furthest(ours, plain_pixels(pipeline, batch, from_embeds=False)) <= 1


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_every_strength_equals_the_plain_pipeline(folder: Path, strength: float) -> None:
    batch = batch_of("image-to-image", [0, 1, 2], strength=strength)
    ours = stages(folder, "image-to-image")(batch).pixels
    theirs = plain_pixels(plain(folder, "image-to-image"), batch, from_embeds=True)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("task", TASKS)
def test_other_sizes_equal_the_plain_pipeline(folder: Path, task: str) -> None:
    batch = batch_of(task, [0, 1, 2], width=48, height=24)
    ours = stages(folder, task)(batch).pixels
    assert ours.shape == (3, 24, 48, 3)
    assert np.array_equal(ours, plain_pixels(plain(folder, task), batch, from_embeds=True))


@pytest.mark.parametrize("task", TASKS)
def test_a_vae_of_another_factor_equals_the_plain_pipeline(tmp_path: Path, task: str) -> None:
    eighth = build_model(tmp_path / "eighth", factor=8)
    batch = batch_of(task, [0, 1, 2])
    ours = Stages(eighth, task)
    assert (ours.info.vae_scale_factor, ours.info.width) == (8, 32)
    pixels = ours(batch).pixels
    assert pixels.shape == (3, 32, 32, 3)
    theirs = plain_pixels(plain(eighth, task), batch, from_embeds=True)
    assert np.array_equal(pixels, theirs)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_equal_the_plain_pipeline(folder: Path, steps: int) -> None:
    batch = batch_of("text-to-image", [0, 1, 2], num_inference_steps=steps)
    ours = stages(folder, "text-to-image", "DDIMScheduler")(batch).pixels
    pipeline = plain(folder, "text-to-image", "DDIMScheduler")
    assert np.array_equal(ours, plain_pixels(pipeline, batch, from_embeds=True))


def test_8_bit_levels_equal_those_of_diffusers() -> None:
    halves = torch.arange(256 * 2 + 1, dtype=torch.float32) / 510  # every level and every half
    noise = torch.rand(3 * 64 * 64 - len(halves), generator=torch.Generator().manual_seed(0))
    unit = torch.cat([halves, noise]).reshape(1, 3, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exact = unit.to(dtype)
        theirs = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(exact))
        assert np.array_equal(to_bytes(exact)[0].numpy(), np.asarray(theirs[0]))


def test_a_shift_factor_is_added_after_scaling() -> None:
    class Config:
        scaling_factor = 0.5
        shift_factor = 3.0

    assert unscaled(torch.ones(1), Config()).item() == 5.0


# --- a sample's bytes do not depend on its neighbours --------------------------------------------


@pytest.mark.parametrize("scheduler", models.SCHEDULERS)
@pytest.mark.parametrize("task", TASKS)
def test_bytes_are_the_same_whatever_neighbours_position_and_padding(
    folder: Path, task: str, scheduler: str
) -> None:
    run = stages(folder, task, scheduler)
    full = run(batch_of(task, [0, 1, 2], num_inference_steps=3)).pixels
    others = run(batch_of(task, [5, 6, 1], num_inference_steps=3)).pixels
    alone = run(batch_of(task, [1], num_inference_steps=3)).pixels
    assert alone.shape == (1, 32, 32, 3)
    assert np.array_equal(full[1], others[2])
    assert np.array_equal(full[1], alone[0])
    assert not np.array_equal(full[0], full[2])  # equal prompts, own seeds


@pytest.mark.parametrize("task", TASKS)
def test_samples_taken_out_of_a_batch_keep_their_bytes(folder: Path, task: str) -> None:
    """As in the staged layout when the suspects of a shard are processed one by one."""
    ours = stages(folder, task)
    whole = ours.encode(batch_of(task, [0, 1, 2]))
    expected = ours.decode(ours.denoise(whole)).pixels
    for places in ([1], [2, 0]):
        (encoded,) = tensor_bytes.encoded_from_bytes(tensor_bytes.encoded_to_bytes([whole]))
        early = ours.decode(ours.denoise(encoded.take(places)))
        late = ours.decode(ours.denoise(whole).take(places))
        assert np.array_equal(early.pixels, expected[places])
        assert np.array_equal(late.pixels, expected[places])


def test_seeds_and_prompts_both_matter(folder: Path) -> None:
    run = stages(folder, "text-to-image")
    batch = batch_of("text-to-image", [0])
    base = run(batch).pixels
    sample = batch.samples[0]
    for change in ({"seed": sample.seed + 1}, {"prompt": "x"}, {"negative_prompt": "y"}):
        changed = ConditionBatch((replace(sample, **change),), {})
        assert not np.array_equal(base, run(changed).pixels)


def test_another_thread_gives_the_same_bytes(folder: Path) -> None:
    run = stages(folder, "text-to-image")
    batch = batch_of("text-to-image", [0, 1, 2])
    seen: dict[str, Any] = {}

    def work() -> None:
        seen["threads"] = torch.get_num_threads()
        seen["pixels"] = run(batch).pixels

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen["threads"] == run.spec.resources.torch_threads
    assert np.array_equal(seen["pixels"], run(batch).pixels)


def test_a_second_run_of_one_stage_object_repeats_itself(folder: Path) -> None:
    run = stages(folder, "image-to-image", "UniPCMultistepScheduler")
    first = run(batch_of("image-to-image", [0, 1, 2])).pixels
    run(batch_of("image-to-image", [3, 4], strength=0.9, num_inference_steps=7))
    assert np.array_equal(first, run(batch_of("image-to-image", [0, 1, 2])).pixels)


# --- between the stages --------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_payloads_carry_everything(folder: Path, task: str) -> None:
    run = stages(folder, task)
    batches = [
        run.encode(batch_of(task, [0, 1])),
        run.encode(batch_of(task, [2], guidance_scale=1.0)),
    ]
    arrived = tensor_bytes.encoded_from_bytes(tensor_bytes.encoded_to_bytes(batches))
    latents = tensor_bytes.latents_from_bytes(
        tensor_bytes.latents_to_bytes([run.denoise(b) for b in arrived])
    )
    for before, after, denoised in zip(batches, arrived, latents, strict=True):
        assert_same_encoded(before, after)
        assert np.array_equal(run.decode(denoised).pixels, run.decode(run.denoise(before)).pixels)


def assert_same_encoded(before: EncodedBatch, after: EncodedBatch) -> None:
    assert (before.call, before.prompt_index) == (after.call, after.prompt_index)
    assert (before.negative_index, before.truncated) == (after.negative_index, after.truncated)
    assert (before.prompts.keys(), before.conditions.keys()) == (
        after.prompts.keys(),
        after.conditions.keys(),
    )
    assert torch.equal(before.generator_states, after.generator_states)
    for left, right in (
        *zip(before.prompts.values(), after.prompts.values(), strict=True),
        *zip(before.conditions.values(), after.conditions.values(), strict=True),
    ):
        assert left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_payloads_are_exact_to_the_bit(dtype: torch.dtype) -> None:
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = raw.view(torch.float16 if dtype == torch.float32 else dtype)  # NaNs, infinities too
    tensor = tensor.to(dtype).reshape(4, 4, 64, 64)
    batch = LatentBatch(Call(2, 0.1 + 0.2, None, 8, 8), tensor[1:3], (True, False))
    (after,) = tensor_bytes.latents_from_bytes(tensor_bytes.latents_to_bytes([batch]))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert (after.call, after.truncated) == (batch.call, batch.truncated)
    assert torch.equal(after.latents.view(bits), tensor[1:3].view(bits))


def test_a_payload_of_another_kind_is_refused() -> None:
    latents = tensor_bytes.latents_to_bytes(
        [LatentBatch(Call(1, 1.0, None, 8, 8), torch.zeros(1), ())]
    )
    with pytest.raises(ValueError, match="expected a payload of kind encoded, got kind latents"):
        tensor_bytes.encoded_from_bytes(latents)
    for data in (b"", b"\x80\x04K\x01.", b"\x02\0\0\0\0\0\0\0{}"):
        with pytest.raises(ValueError, match="not a batchgen payload"):
            tensor_bytes.latents_from_bytes(data)
