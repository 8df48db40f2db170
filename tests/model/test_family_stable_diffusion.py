"""Stable Diffusion 1 and 2 and latent consistency models: equal to the plain pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models.tiny.stable_diffusion import (
    build_consistency,
    build_inpainting,
    build_stable_diffusion,
)
from batchgen.records import Call
from batchgen.spec.model import Model
from tests.family_stages import FamilyStages, batch, call, picture
from tests.model_folders import edit
from tests.plain_stable_diffusion import Plain, check_equal

PICTURES = {"image": [picture(number) for number in range(3)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_consistency(tmp_path_factory.mktemp("models") / "consistency")


@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_text_to_image_with_any_scheduler(folder: Path, scheduler: str | None) -> None:
    stages = FamilyStages(folder, "text-to-image", scheduler=scheduler)
    given = batch([0, 1, 2], call(eta=0.8))
    plain = Plain("StableDiffusionPipeline", folder, scheduler)
    check_equal("stable-diffusion", stages, plain, given, eta=0.8, width=32, height=32)
    assert_each_matters(stages, given.call, guidance_scale=1.0, num_inference_steps=4, width=40)


def test_eta_reaches_the_scheduler(folder: Path) -> None:
    stages = FamilyStages(folder, "text-to-image", scheduler="DDIMScheduler")
    assert_each_matters(stages, call(), eta=0.8)


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_without_guidance(folder: Path, task: str) -> None:
    text = task == "text-to-image"
    stages = FamilyStages(folder, task)
    shared = call(guidance_scale=1.0, strength=None if text else 0.7)
    given = batch([0, 1, 2], shared, {} if text else PICTURES)
    name = "StableDiffusionPipeline" if text else "StableDiffusionImg2ImgPipeline"
    size = {"width": 32, "height": 32} if text else {"strength": 0.7}
    check_equal("stable-diffusion", stages, Plain(name, folder), given, **size)
    assert stages.encode(given).negative_index is None


def test_image_to_image(folder: Path) -> None:
    stages = FamilyStages(folder, "image-to-image")
    given = batch([0, 1, 2], call(strength=0.7), PICTURES)
    plain = Plain("StableDiffusionImg2ImgPipeline", folder)
    check_equal("stable-diffusion", stages, plain, given, strength=0.7)


def test_consistency_from_noise(consistency: Path) -> None:
    stages = FamilyStages(consistency, "text-to-image")
    assert (stages.info.num_inference_steps, stages.info.guidance_scale) == (4, 8.5)
    given = batch([0, 1, 2], call(guidance_scale=8.5))
    plain = Plain("LatentConsistencyModelPipeline", consistency)
    check_equal("latent-consistency", stages, plain, given, width=32, height=32)
    assert stages.encode(given).negative_index is None
    assert_each_matters(stages, given.call, guidance_scale=3.0, num_inference_steps=4)
    first = stages.fused(given).pixels
    negative = batch([0, 1, 2], given.call, negative_prompt="a blue circle")
    assert np.array_equal(stages.fused(negative).pixels, first)


def test_consistency_from_an_image(consistency: Path) -> None:
    stages = FamilyStages(consistency, "image-to-image")
    given = batch([0, 1, 2], call(guidance_scale=8.5, strength=0.5), PICTURES)
    plain = Plain("LatentConsistencyModelImg2ImgPipeline", consistency)
    check_equal("latent-consistency", stages, plain, given, strength=0.5)
    first = stages.fused(given).pixels
    farther = stages.fused(batch([0, 1, 2], replace(given.call, strength=0.9), PICTURES)).pixels
    other = {"image": [picture(number + 5) for number in range(3)]}
    assert not np.array_equal(farther, first)
    assert not np.array_equal(stages.fused(batch([0, 1, 2], given.call, other)).pixels, first)


def test_consistency_needs_its_own_scheduler(consistency: Path) -> None:
    with pytest.raises(ModelError, match=r"scheduler DDIMScheduler: .* only with LCMScheduler"):
        FamilyStages(consistency, "text-to-image", scheduler="DDIMScheduler")


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_a_consistency_model_without_text_encoder_is_refused(tmp_path: Path, task: str) -> None:
    folder = build_consistency(tmp_path / "consistency")
    edit(folder / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ModelError, match=r"text_encoder: .* lists no such component"):
        models.inspect(Model(path=str(folder)), task)


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_a_model_for_inpainting_is_refused_with_what_it_fits(tmp_path: Path, task: str) -> None:
    folder = build_inpainting(tmp_path / "inpainting")
    with pytest.raises(ModelError, match=r"unet takes 9 channels.* takes 4 .*; it fits inpainting"):
        models.inspect(Model(path=str(folder)), task)


def assert_each_matters(stages: FamilyStages, shared: Call, **settings: float) -> None:
    """Another prompt, another seed and other settings each give other pixels."""
    first = stages.fused(batch([0, 1, 2], shared)).pixels
    single: list[dict[str, Any]] = [{name: value} for name, value in settings.items()]
    changed = [
        batch([0, 1, 2], shared, prompt="violet"),
        batch([0, 1, 2], shared, seed=99),
        *(batch([0, 1, 2], replace(shared, **one)) for one in single),
    ]
    for other in changed:
        assert not np.array_equal(stages.fused(other).pixels, first)
