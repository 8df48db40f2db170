"""The x4 and latent upscalers: equal to the plain pipelines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models.tiny.stable_diffusion import (
    build_edit,
    build_latent_upscaler,
    build_stable_diffusion,
    build_upscaler,
)
from batchgen.records import ConditionBatch
from batchgen.spec.model import Model
from tests.family_stages import FamilyStages, batch, call, picture
from tests.model_folders import edit
from tests.plain_stable_diffusion import Plain, check_equal

TASK = "super-resolution"
BY_PIXELS, BY_LATENTS = "StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline"
SMALL = {"image": [picture(number, 8, 8) for number in range(3)]}  # to 32 x 32
HALF = {"image": [picture(number, 32, 32) for number in range(3)]}  # to 64 x 64


class PlainByLatents(Plain):
    """Of prompts it takes pooled embeddings too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(BY_LATENTS, folder)

    def prompts(self, given: ConditionBatch) -> dict[str, torch.Tensor]:
        found = {}
        for prefix, texts in (
            ("", [one.prompt for one in given.samples]),
            ("negative_", [one.negative_prompt for one in given.samples]),
        ):
            encoded = [self.pipeline.encode_prompt(text, "cpu", False) for text in texts]
            found[f"{prefix}prompt_embeds"] = torch.cat([one[0] for one in encoded])
            found[f"{prefix}pooled_prompt_embeds"] = torch.cat([one[2] for one in encoded])
        return found


@pytest.fixture(scope="module")
def x4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_upscaler(tmp_path_factory.mktemp("models") / "x4")


@pytest.fixture(scope="module")
def x2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_latent_upscaler(tmp_path_factory.mktemp("models") / "x2")


@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("settings", [{}, {"noise_level": 100}, {"guidance_scale": 1.0}])
def test_by_four(x4: Path, settings: dict[str, float], scheduler: str | None) -> None:
    stages = FamilyStages(x4, TASK, scheduler=scheduler)
    info = stages.info
    assert (info.width, info.height, info.upscale, info.multiple_of) == (32, 32, 4, 16)
    given = batch([0, 1, 2], call(**settings), SMALL)
    level = {name: value for name, value in settings.items() if name == "noise_level"}
    plain = Plain(BY_PIXELS, x4, scheduler)
    check_equal("stable-diffusion-x4", stages, plain, given, **level)
    assert stages.fused(given).pixels.shape == (3, 32, 32, 3)


def test_images_that_are_not_square(x4: Path, x2: Path) -> None:
    given = batch([0, 1, 2], call(width=48), {"image": [picture(n, 12, 8) for n in range(3)]})
    check_equal("stable-diffusion-x4", FamilyStages(x4, TASK), Plain(BY_PIXELS, x4), given)
    wide = call(width=96, height=64)
    given = batch([0, 1, 2], wide, {"image": [picture(n, 48, 32) for n in range(3)]})
    check_equal("latent-upscaler", FamilyStages(x2, TASK), PlainByLatents(x2), given)


def test_without_a_prompt_it_is_the_empty_one(x4: Path) -> None:
    stages = FamilyStages(x4, TASK)
    given = batch([0, 1, 2], call(), SMALL, prompt="", negative_prompt="")
    check_equal("stable-diffusion-x4", stages, Plain(BY_PIXELS, x4), given)


def test_everything_given_by_four_matters(x4: Path) -> None:
    stages = FamilyStages(x4, TASK, scheduler="DDIMScheduler")
    shared = call(noise_level=20)
    first = stages.fused(batch([0, 1, 2], shared, SMALL)).pixels
    for other in (
        batch([0, 1, 2], shared, SMALL, prompt="violet"),
        batch([0, 1, 2], shared, SMALL, negative_prompt="violet"),
        batch([0, 1, 2], shared, SMALL, seed=99),
        batch([0, 1, 2], shared, {"image": SMALL["image"][::-1]}),
        batch([0, 1, 2], replace(shared, noise_level=21), SMALL),
        batch([0, 1, 2], replace(shared, guidance_scale=1.0), SMALL),
        batch([0, 1, 2], replace(shared, eta=0.5), SMALL),
    ):
        assert not np.array_equal(stages.fused(other).pixels, first)
    default = stages.fused(batch([0, 1, 2], call(), SMALL)).pixels
    assert np.array_equal(default, first)  # 20 is the pipeline's own noise_level


def test_a_noise_level_beyond_the_models_is_refused(x4: Path) -> None:
    stages = FamilyStages(x4, TASK)
    with pytest.raises(ValueError, match="`noise_level` has to be <= 350 but is 351"):
        stages.fused(batch([0, 1, 2], call(noise_level=351), SMALL))


@pytest.mark.filterwarnings("ignore:The configuration file of the vae:FutureWarning")
def test_latents_are_scaled_as_the_x4_pipeline_wants_them(tmp_path: Path, x4: Path) -> None:
    """It sets 0.08333 where the saved VAE says another factor; so does the decode stage."""
    folder = build_upscaler(tmp_path / "x4")
    edit(folder / "vae" / "config.json", scaling_factor=0.18215)
    given = batch([0, 1, 2], call(), SMALL)
    ours = FamilyStages(folder, TASK).fused(given).pixels
    assert np.array_equal(ours, Plain(BY_PIXELS, folder).pixels(given))
    assert np.array_equal(ours, Plain(BY_PIXELS, x4).pixels(given))


@pytest.mark.parametrize("guidance", [3.0, 1.0, 0.0])
def test_by_two(x2: Path, guidance: float) -> None:
    stages = FamilyStages(x2, TASK)
    info = stages.info
    assert (info.width, info.height, info.upscale, info.multiple_of) == (64, 64, 2, 32)
    given = batch([0, 1, 2], call(guidance_scale=guidance, width=64, height=64), HALF)
    check_equal("latent-upscaler", stages, PlainByLatents(x2), given)
    assert stages.fused(given).pixels.shape == (3, 64, 64, 3)


def test_without_prompt_and_guidance_it_is_the_call_with_text(x2: Path) -> None:
    stages = FamilyStages(x2, TASK)
    shared = call(guidance_scale=0.0, width=64, height=64)
    given = batch([0, 1, 2], shared, HALF, prompt="")
    more = {"prompt_embeds": None, "pooled_prompt_embeds": None}
    more |= {f"negative_{name}": None for name in more}
    text = PlainByLatents(x2).pixels(given, prompt=["any", "text", "at all"], **more)
    difference = np.abs(stages.fused(given).pixels.astype(int) - text.astype(int)).max()
    assert difference <= 1  # the library encodes three prompts at once, we one


def test_everything_given_by_two_matters(x2: Path) -> None:
    stages = FamilyStages(x2, TASK)
    shared = call(width=64, height=64)
    first = stages.fused(batch([0, 1, 2], shared, HALF)).pixels
    for other in (
        batch([0, 1, 2], shared, HALF, prompt="violet"),
        batch([0, 1, 2], shared, HALF, negative_prompt="violet"),
        batch([0, 1, 2], shared, HALF, seed=99),
        batch([0, 1, 2], shared, {"image": HALF["image"][::-1]}),
        batch([0, 1, 2], replace(shared, guidance_scale=1.0), HALF),
        batch([0, 1, 2], replace(shared, num_inference_steps=4), HALF),
    ):
        assert not np.array_equal(stages.fused(other).pixels, first)


def test_by_two_needs_its_own_scheduler(x2: Path) -> None:
    """Others draw from no generator of the sample's there, or have no sigmas."""
    with pytest.raises(ModelError, match="works only with EulerDiscreteScheduler"):
        FamilyStages(x2, TASK, scheduler="EulerAncestralDiscreteScheduler")


@pytest.mark.parametrize(("pipeline", "wanted"), [(BY_PIXELS, 7), (BY_LATENTS, 8)])
def test_a_model_of_other_channels_is_refused(tmp_path: Path, pipeline: str, wanted: int) -> None:
    folder = build_stable_diffusion(tmp_path / "plain")
    scheduler = ["diffusers", "PNDMScheduler"]
    shutil.copytree(folder / "scheduler", folder / "low_res_scheduler")
    edit(folder / "model_index.json", _class_name=pipeline, low_res_scheduler=scheduler)
    with pytest.raises(ModelError, match=f"unet takes 4 channels, .* for {TASK} takes {wanted} "):
        models.inspect(Model(path=str(folder)), TASK)


def test_a_model_without_its_second_scheduler_is_refused(tmp_path: Path) -> None:
    folder = build_upscaler(tmp_path / "x4")
    edit(folder / "model_index.json", low_res_scheduler=[None, None])
    with pytest.raises(ModelError, match=r"low_res_scheduler: .* lists no such component"):
        models.inspect(Model(path=str(folder)), TASK)


def test_a_model_for_edits_is_no_upscaler(tmp_path: Path) -> None:
    folder = build_edit(tmp_path / "edit")
    with pytest.raises(ModelError, match=r"it fits image-edit, not super-resolution"):
        models.inspect(Model(path=str(folder)), TASK)
