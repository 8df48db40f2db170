"""Inpainting by Stable Diffusion, U-Nets of 4 and of 9 channels: equal to the plain pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models.tiny.stable_diffusion import (
    build_edit,
    build_inpainting,
    build_stable_diffusion,
)
from batchgen.spec.model import Model
from tests.family_stages import FamilyStages, batch, call, mask, picture
from tests.model_folders import edit
from tests.plain_stable_diffusion import Plain, check_equal

TASK, PIPELINE = "inpainting", "StableDiffusionInpaintPipeline"
PICTURES = {
    "image": [picture(number) for number in range(3)],
    "mask": [mask(number) for number in range(3)],
}
# Draws fresh noise at every step, so that it shows if numbers were drawn in another order.
DRAWING = "DDIMScheduler"


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stable_diffusion(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inpainting(tmp_path_factory.mktemp("models") / "inpainting")


@pytest.fixture(params=["4 channels", "9 channels", "4 channels, saved for inpainting"])
def folder(
    request: pytest.FixtureRequest,
    plain_folder: Path,
    own_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if request.param != "4 channels, saved for inpainting":
        return plain_folder if request.param == "4 channels" else own_folder
    saved = build_stable_diffusion(tmp_path_factory.mktemp("models") / "renamed")
    edit(saved / "model_index.json", _class_name=PIPELINE)
    return saved


@pytest.mark.parametrize(("strength", "scheduler"), [(None, DRAWING), (0.7, DRAWING), (1.0, None)])
def test_inpainting(folder: Path, strength: float | None, scheduler: str | None) -> None:
    stages = FamilyStages(folder, TASK, scheduler=scheduler)
    assert stages.info.strength == 1.0
    given = batch([0, 1, 2], call(strength=strength, eta=0.6), PICTURES)
    more = {} if strength is None else {"strength": strength}
    plain = Plain(PIPELINE, folder, scheduler)
    check_equal("stable-diffusion", stages, plain, given, eta=0.6, width=32, height=32, **more)


def test_without_guidance(folder: Path) -> None:
    stages = FamilyStages(folder, TASK)
    given = batch([0, 1, 2], call(strength=0.7, guidance_scale=1.0), PICTURES)
    plain = Plain(PIPELINE, folder)
    check_equal("stable-diffusion", stages, plain, given, strength=0.7, width=32, height=32)


def test_grey_masks_are_cut_at_one_half_as_in_the_plain_pipeline(own_folder: Path) -> None:
    ramp = np.tile(np.linspace(120, 135, 32).astype(np.uint8), (32, 1))
    given = batch([0, 1, 2], call(strength=0.7), {**PICTURES, "mask": [ramp, ramp.T, ramp]})
    stages = FamilyStages(own_folder, TASK)
    plain = Plain(PIPELINE, own_folder)
    check_equal("stable-diffusion", stages, plain, given, strength=0.7, width=32, height=32)


def test_everything_given_matters(folder: Path) -> None:
    stages = FamilyStages(folder, TASK, scheduler=DRAWING)
    shared = call(strength=0.7)
    first = stages.fused(batch([0, 1, 2], shared, PICTURES)).pixels
    images = {**PICTURES, "image": PICTURES["image"][::-1]}
    masks = {**PICTURES, "mask": PICTURES["mask"][::-1]}
    for other in (
        batch([0, 1, 2], shared, PICTURES, prompt="violet"),
        batch([0, 1, 2], shared, PICTURES, negative_prompt="violet"),
        batch([0, 1, 2], shared, PICTURES, seed=99),
        batch([0, 1, 2], shared, images),
        batch([0, 1, 2], shared, masks),
        batch([0, 1, 2], replace(shared, strength=1.0), PICTURES),
        batch([0, 1, 2], replace(shared, guidance_scale=1.0), PICTURES),
        batch([0, 1, 2], replace(shared, eta=0.5), PICTURES),
    ):
        assert not np.array_equal(stages.fused(other).pixels, first)


def test_a_u_net_of_4_channels_leaves_the_latents_outside_the_mask(plain_folder: Path) -> None:
    """They end as the image's own latents, which the pipeline puts back after every step."""
    stages = FamilyStages(plain_folder, TASK)
    given = batch([0, 1, 2], call(strength=0.7), PICTURES)
    encoded = stages.encode(given)
    made = stages.denoise(encoded).latents
    asked = batch([0, 1, 2], given.call, PICTURES, prompt="violet")
    other = stages.denoise(stages.encode(asked)).latents
    painted = encoded.conditions["mask"].bool().expand_as(made)
    assert torch.equal(made[~painted], other[~painted])
    assert not torch.equal(made[painted], other[painted])
    mean, logvar = encoded.conditions["image"].chunk(2, dim=1)
    factor = stages.decode.pipeline.vae.config.scaling_factor
    off = (made / factor - mean).abs() / torch.exp(0.5 * logvar)  # in standard deviations
    assert off[~painted].max() < 6
    assert off[painted].max() > 6


def test_variants_of_a_row_share_what_is_encoded(own_folder: Path) -> None:
    stages = FamilyStages(own_folder, TASK)
    image, painted = PICTURES["image"][0], PICTURES["mask"][0]
    calls, encode = [], stages.encode.pipeline.vae.encode

    def counted(pixels: torch.Tensor) -> object:
        calls.append(len(pixels))
        return encode(pixels)

    stages.encode.pipeline.vae.encode = counted
    given = batch([0, 1, 2], call(), {"image": [image] * 3, "mask": [painted] * 3})
    encoded = stages.encode(given)
    assert calls == [1, 1]
    assert torch.equal(encoded.conditions["masked"][0], encoded.conditions["masked"][2])


def test_a_model_with_other_channels_is_refused(tmp_path: Path) -> None:
    folder = build_edit(tmp_path / "edit")
    edit(folder / "model_index.json", _class_name=PIPELINE)
    with pytest.raises(ModelError, match=r"unet takes 8 channels.* for inpainting takes 4 or 9"):
        models.inspect(Model(path=str(folder)), TASK)


def test_a_model_without_vae_is_refused(tmp_path: Path) -> None:
    folder = build_inpainting(tmp_path / "inpainting")
    edit(folder / "model_index.json", vae=[None, None])
    with pytest.raises(
        ModelError, match=r"vae: .* lists no such component; set model\.components\.vae"
    ):
        models.inspect(Model(path=str(folder)), TASK)


def test_a_strength_that_leaves_no_step_is_refused(own_folder: Path) -> None:
    stages = FamilyStages(own_folder, TASK)
    with pytest.raises(ValueError, match=r"strength 0\.2 of 3 steps leaves no step"):
        stages.fused(batch([0], call(strength=0.2), {n: v[:1] for n, v in PICTURES.items()}))
