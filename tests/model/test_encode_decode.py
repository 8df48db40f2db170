"""Each stage on its own: what it caches, what it hands on, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchgen.records import (
    GENERATOR_STATE_BYTES,
    Call,
    ConditionBatch,
    LatentBatch,
)
from batchgen.stages.denoise import filled, restored_generators
from batchgen.stages.encode import Encoder, seeded_generator
from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import Scored
from tests.tiny_models import build_model
from tests.tiny_stages import (
    PLAIN,
    TASKS,
    B,
    Stages,
    batch_of,
    image,
    plain_pixels,
    stages,
)

# of numpy 2, said of schedulers' code in diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


# --- encode --------------------------------------------------------------------------------------


def test_each_unique_prompt_is_encoded_once_and_kept(folder: Path) -> None:
    encoder = Stages(folder, "text-to-image").encode
    shapes: list[tuple[int, ...]] = []
    encoder.pipeline.text_encoder.register_forward_hook(
        lambda _module, args, output: shapes.append(tuple(args[0].shape))
    )
    first = encoder(batch_of("text-to-image", [0, 1, 2], negative="seven"))
    assert first.prompts["prompt_embeds"].shape == (3, 16, 32)  # two prompts and the negative
    assert first.prompt_index == (0, 1, 0)
    assert first.negative_index == (2, 2, 2)
    encoder(batch_of("text-to-image", [3, 2, 1]))
    assert shapes == [(1, 16)] * 5  # "seven" as a prompt, and "grey" as a negative, are new


def test_rows_with_another_setting_of_the_prompt_share_no_embedding(folder: Path) -> None:
    encoder = Stages(folder, "text-to-image").encode

    def encode_prompt(pipeline: Any, prompt: str, negative: bool, eta: float) -> Any:
        return {"prompt_embeds": torch.full((1, 2), eta)}

    adapter = replace(encoder.adapter, encode_prompt=encode_prompt, prompt_settings=("eta",))
    encode = Encoder(encoder.pipeline, adapter, B)
    for eta in (0.25, 0.75, 0.25):
        encoded = encode(batch_of("text-to-image", [0, 1], eta=eta))
        assert torch.equal(encoded.prompts["prompt_embeds"], torch.full((3, 2), eta))
    assert len(encode._prompts) == 6


def test_the_oldest_prompts_are_forgotten(folder: Path) -> None:
    encoder = Stages(folder, "text-to-image").encode
    small = Encoder(encoder.pipeline, encoder.adapter, B, cache_bytes=2 * 16 * 32 * 4)
    expected = encoder(batch_of("text-to-image", [0, 1, 3])).prompts
    again = small(batch_of("text-to-image", [0, 1, 3])).prompts
    assert torch.equal(again["prompt_embeds"], expected["prompt_embeds"])
    assert [prompt for prompt, *_ in small._prompts] == ["seven", "grey"]


def test_memory_is_given_back_as_prompts_are_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[None] = []
    monkeypatch.setattr("batchgen.stages.encode._give_memory_back", lambda: given_back.append(None))
    encoder = Stages(folder, "text-to-image").encode
    small = Encoder(encoder.pipeline, encoder.adapter, B, cache_bytes=2 * 16 * 32 * 4)
    small(batch_of("text-to-image", [0]))
    assert not given_back
    small(batch_of("text-to-image", [1, 3]))
    assert given_back


@pytest.mark.parametrize(
    ("guidance_scale", "guided"), [(0.0, False), (1.0, False), (1.01, True), (7.5, True)]
)
def test_negatives_are_encoded_for_guidance_only(
    folder: Path, guidance_scale: float, guided: bool
) -> None:
    encoder = stages(folder, "text-to-image").encode
    encoded = encoder(batch_of("text-to-image", [0, 1], guidance_scale=guidance_scale))
    assert (encoded.negative_index is not None) == guided
    assert len(encoded.prompts["prompt_embeds"]) == (3 if guided else 2)


def test_a_prompt_longer_than_the_text_encoder_reads_is_reported(folder: Path) -> None:
    run = stages(folder, "text-to-image")
    sample = batch_of("text-to-image", [0]).samples[0]
    words = ["a", "ab" * 7, "ab" * 7 + "a", ""]  # 14 letters, start and end: 16 tokens
    samples = tuple(replace(sample, prompt=word) for word in words[:B])
    encoded = run.encode(ConditionBatch(samples, {}))
    assert encoded.truncated == (False, False, True)
    denoised = run.denoise(encoded)
    assert denoised.truncated == run.decode(denoised).truncated == (False, False, True)
    assert run.encode(ConditionBatch((replace(sample, prompt=""),), {})).truncated == (False,)


def test_text_batches_carry_fresh_generators(folder: Path) -> None:
    batch = batch_of("text-to-image", [0, 1])
    states = stages(folder, "text-to-image").encode(batch).generator_states
    assert (states.shape, states.dtype) == ((2, GENERATOR_STATE_BYTES), torch.uint8)
    for sample, state in zip(batch.samples, states, strict=True):
        fresh = seeded_generator(sample.seed)
        assert torch.equal(fresh.get_state(), state)


def test_image_batches_carry_generators_that_drew_the_posterior(folder: Path) -> None:
    batch = batch_of("image-to-image", [0, 1])
    encoded = stages(folder, "image-to-image").encode(batch)
    assert encoded.conditions["image"].shape == (2, 4, 8, 8)
    for sample, state in zip(batch.samples, encoded.generator_states, strict=True):
        used = seeded_generator(sample.seed)
        torch.randn((1, 4, 8, 8), generator=used)
        assert torch.equal(used.get_state(), state)


def test_variants_of_one_image_are_encoded_once_and_differ(folder: Path) -> None:
    encoder = Stages(folder, "image-to-image").encode
    calls: list[int] = []
    encoder.pipeline.vae.encoder.register_forward_hook(
        lambda _module, args, output: calls.append(len(args[0]))
    )
    batch = batch_of("image-to-image", [0, 1, 2])
    same = image(0)
    latents = encoder(ConditionBatch(batch.samples, {"image": (same, same, same)})).conditions[
        "image"
    ]
    assert calls == [1]
    assert not torch.equal(latents[0], latents[1])
    copies = encoder(ConditionBatch(batch.samples, {"image": (same, same.copy(), same.copy())}))
    assert calls == [1, 1, 1, 1]
    assert torch.equal(copies.conditions["image"], latents)


def test_images_of_another_size_are_refused(folder: Path) -> None:
    encoder = stages(folder, "image-to-image").encode
    samples = batch_of("image-to-image", [0, 1]).samples
    for images in ((image(0), image(1, width=40)), (image(0),)):
        with pytest.raises(ValueError, match="image: expected 2 images of one size"):
            encoder(ConditionBatch(samples, {"image": images}))


# --- denoise and decode --------------------------------------------------------------------------


def test_the_unet_always_sees_the_full_batch(folder: Path) -> None:
    run = Stages(folder, "text-to-image", batch_size=4)
    seen: list[int] = []
    run.denoise.pipeline.unet.register_forward_hook(
        lambda _module, args, output: seen.append(len(args[0]))
    )
    latents = run.denoise(run.encode(batch_of("text-to-image", [0], guidance_scale=1.0)))
    run.denoise(run.encode(batch_of("text-to-image", [0, 1])))
    assert latents.latents.shape == (1, 4, 8, 8)
    assert set(seen) == {4, 8}  # 8: with and without the prompt


def test_the_vae_always_sees_the_full_batch(folder: Path) -> None:
    decoder = Stages(folder, "text-to-image", batch_size=4).decode
    seen: list[int] = []
    decoder.pipeline.vae.decoder.register_forward_hook(
        lambda _module, args, output: seen.append(len(args[0]))
    )
    latents = torch.zeros(1, 4, 8, 8)
    decoder(LatentBatch(Call(1, 1.0, None, 32, 32), latents, (False,)))
    assert seen == [4]


def test_more_samples_than_the_batch_size_are_refused(folder: Path) -> None:
    run = stages(folder, "text-to-image")
    encoded = run.encode(batch_of("text-to-image", [0, 1, 2, 3]))
    with pytest.raises(ValueError, match="4 samples for a batch size of 3"):
        run.denoise(encoded)
    with pytest.raises(ValueError, match="0 samples"):
        filled(0, 3)


def test_a_strength_that_leaves_no_step_is_refused(folder: Path) -> None:
    run = stages(folder, "image-to-image")
    encoded = run.encode(batch_of("image-to-image", [0], strength=0.2))
    with pytest.raises(ValueError, match=r"strength 0\.2 of 4 steps leaves no step"):
        run.denoise(encoded)


def test_generators_go_on_from_their_states() -> None:
    used = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    torch.randn(3, generator=used[1])
    states = torch.stack([generator.get_state() for generator in used])
    restored = restored_generators(states, 3)
    assert len(restored) == 3
    for generator, original in zip(restored, used, strict=False):
        assert torch.equal(torch.randn(5, generator=generator), torch.randn(5, generator=original))


def test_values_that_are_not_numbers_are_flagged_and_black(folder: Path) -> None:
    run = stages(folder, "text-to-image")
    denoised = run.denoise(run.encode(batch_of("text-to-image", [0, 1, 2])))
    good = run.decode(denoised)
    broken = denoised.latents.clone()
    broken[1] = float("nan")
    images = run.decode(replace(denoised, latents=broken))
    assert good.finite == (True, True, True)
    assert images.finite == (True, False, True)
    assert not images.pixels[1].any()
    assert np.array_equal(images.pixels[[0, 2]], good.pixels[[0, 2]])


def test_an_overflow_is_flagged_though_clamping_hides_it(folder: Path) -> None:
    decoder = Stages(folder, "text-to-image").decode

    def overflow(_module: Any, _arguments: Any, decoded: torch.Tensor) -> torch.Tensor:
        decoded[1, :, 0, 0] = float("inf")
        return decoded

    decoder.pipeline.vae.decoder.register_forward_hook(overflow)
    images = decoder(LatentBatch(Call(1, 1.0, None, 32, 32), torch.zeros(2, 4, 8, 8), (False,) * 2))
    assert images.finite == (True, False)
    assert images.pixels[1, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_equals_the_plain_pipeline(folder: Path, task: str) -> None:
    batch = batch_of(task, [0, 1, 2])
    run = Stages(folder, task, dtype="bfloat16")
    encoded = run.encode(batch)
    assert encoded.prompts["prompt_embeds"].dtype == torch.bfloat16
    pipeline = PLAIN[task].from_pretrained(
        folder, dtype=torch.bfloat16, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    ours = run.decode(run.denoise(encoded)).pixels
    assert np.array_equal(ours, plain_pixels(pipeline, batch, from_embeds=True))


# --- score ---------------------------------------------------------------------------------------


def test_scores_are_in_8_bit_levels() -> None:
    pixels = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    pixels[1] = 200
    pixels[2, ..., 0] = 255  # one colour, though its channels differ
    pixels[3, 0, 0] = 1
    scores = PixelStatistics()(Scored(list(pixels)))
    assert scores["is_flat"] == [True, True, True, False]
    assert scores["pixel_mean"] == [0.0, 200.0, 85.0, 0.25]
    deviations = scores["pixel_std"]
    assert deviations[:2] == [0.0, 0.0]
    assert deviations[2] == pytest.approx(np.std([255, 0, 0]))


def test_generators_differ_in_every_bit_of_the_seed() -> None:
    states = {
        bytes(seeded_generator(5 + (1 << bit)).get_state().numpy().tobytes()) for bit in range(63)
    }
    assert len(states) == 63
    draws = {float(torch.randn(1, generator=seeded_generator(5 + (n << 32)))) for n in range(50)}
    assert len(draws) == 50


def test_small_seeds_are_those_of_torch_and_the_state_is_a_mersenne_twister() -> None:
    small = torch.randn(64, generator=torch.Generator().manual_seed(1234))
    assert torch.equal(torch.randn(64, generator=seeded_generator(1234)), small)
    large = 7 + (9 << 32)
    words = np.random.RandomState([7, 9]).randint(0, 2**32, 16, dtype=np.uint32)
    drawn = torch.randint(0, 2**31, (8,), generator=seeded_generator(large)).tolist()
    assert drawn == [int(word) % 2**31 for word in words[1::2]]  # torch draws 64 bits for each
