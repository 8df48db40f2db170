"""InstructPix2Pix and depth to image: equal to the plain pipelines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError, SpecError
from batchgen.models.tiny.stable_diffusion import (
    build_depth,
    build_edit,
    build_stable_diffusion,
)
from batchgen.plan.checks import check_fit
from batchgen.spec.model import Model
from tests.family_stages import Array, FamilyStages, batch, call, picture
from tests.model_folders import edit
from tests.plain_stable_diffusion import Plain, check_equal

EDIT, DEPTH = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionDepth2ImgPipeline"
PICTURES = {"image": [picture(number) for number in range(3)]}
OTHERS = {"image": [picture(number + 5) for number in range(3)]}


def depth(number: int) -> Array:
    """uint8 grey (32, 32, 3): a slope that differs by number."""
    slope = np.add.outer(np.arange(32) * 2, np.arange(32) * (number + 1)).astype(np.uint8)
    return np.stack([slope] * 3, axis=-1)


DEPTHS = {**PICTURES, "control": [depth(number) for number in range(3)]}


@pytest.fixture(scope="module")
def edit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_edit(tmp_path_factory.mktemp("models") / "edit")


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_depth(tmp_path_factory.mktemp("models") / "depth")


@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize(
    ("guidance", "image_guidance", "guided"),
    [(3.0, None, True), (3.0, 2.0, True), (3.0, 1.0, True), (3.0, 0.5, False), (1.0, 2.0, False)],
)
def test_edit(
    edit_folder: Path,
    guidance: float,
    image_guidance: float | None,
    guided: bool,
    scheduler: str | None,
) -> None:
    stages = FamilyStages(edit_folder, "image-edit", scheduler=scheduler)
    shared = call(guidance_scale=guidance, image_guidance_scale=image_guidance)
    given = batch([0, 1, 2], shared, PICTURES)
    assert (stages.encode(given).negative_index is not None) == guided
    more = {} if image_guidance is None else {"image_guidance_scale": image_guidance}
    check_equal("instruct-pix2pix", stages, Plain(EDIT, edit_folder, scheduler), given, **more)


def test_everything_given_to_an_edit_matters(edit_folder: Path) -> None:
    stages = FamilyStages(edit_folder, "image-edit", scheduler="DDIMScheduler")
    shared = call(image_guidance_scale=1.5)
    first = stages.fused(batch([0, 1, 2], shared, PICTURES)).pixels
    for other in (
        batch([0, 1, 2], shared, PICTURES, prompt="violet"),
        batch([0, 1, 2], shared, PICTURES, negative_prompt="violet"),
        batch([0, 1, 2], shared, PICTURES, seed=99),
        batch([0, 1, 2], shared, OTHERS),
        batch([0, 1, 2], replace(shared, image_guidance_scale=3.0), PICTURES),
        batch([0, 1, 2], replace(shared, guidance_scale=5.0), PICTURES),
        batch([0, 1, 2], replace(shared, eta=0.5), PICTURES),
    ):
        assert not np.array_equal(stages.fused(other).pixels, first)


ignore_autocast = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


@ignore_autocast  # which the plain pipeline asks for whatever the precision
@pytest.mark.parametrize("settings", [{}, {"strength": 0.7}, {"guidance_scale": 1.0}])
@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
def test_depth_that_the_model_estimates(
    depth_folder: Path, settings: dict[str, float], scheduler: str | None
) -> None:
    stages = FamilyStages(depth_folder, "control", scheduler=scheduler)
    assert stages.info.strength == 0.8
    given = batch([0, 1, 2], call(**settings), PICTURES)
    strength = {name: value for name, value in settings.items() if name == "strength"}
    check_equal("depth-to-image", stages, Plain(DEPTH, depth_folder, scheduler), given, **strength)


def test_depth_maps_that_rows_bring(depth_folder: Path) -> None:
    stages = FamilyStages(depth_folder, "control")
    given = batch([0, 1, 2], call(strength=0.7), DEPTHS)
    maps = np.stack([one[..., 0] for one in DEPTHS["control"]])
    more = {"strength": 0.7, "depth_map": torch.from_numpy(maps).float()}
    # With AVX-512 kernels one pixel of three images is rounded to the other side; with AVX2 none.
    check_equal("depth-to-image", stages, Plain(DEPTH, depth_folder), given, furthest=1, **more)


@ignore_autocast
def test_images_that_are_not_square(depth_folder: Path) -> None:
    wide = {"image": [picture(number, width=48) for number in range(3)]}
    given = batch([0, 1, 2], call(strength=0.7, width=48), wide)
    stages = FamilyStages(depth_folder, "control")
    check_equal("depth-to-image", stages, Plain(DEPTH, depth_folder), given, strength=0.7)


def test_everything_given_for_depth_matters(depth_folder: Path) -> None:
    stages = FamilyStages(depth_folder, "control", scheduler="DDIMScheduler")
    shared = call(strength=0.7)
    first = stages.fused(batch([0, 1, 2], shared, DEPTHS)).pixels
    for other in (
        batch([0, 1, 2], shared, DEPTHS, prompt="violet"),
        batch([0, 1, 2], shared, DEPTHS, negative_prompt="violet"),
        batch([0, 1, 2], shared, DEPTHS, seed=99),
        batch([0, 1, 2], shared, {**DEPTHS, **OTHERS}),
        batch([0, 1, 2], shared, {**DEPTHS, "control": DEPTHS["control"][::-1]}),
        batch([0, 1, 2], shared, PICTURES),
        batch([0, 1, 2], replace(shared, strength=1.0), DEPTHS),
        batch([0, 1, 2], replace(shared, guidance_scale=1.0), DEPTHS),
        batch([0, 1, 2], replace(shared, eta=0.5), DEPTHS),
    ):
        assert not np.array_equal(stages.fused(other).pixels, first)


def test_a_model_without_estimator_takes_depth_maps_alone(
    depth_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(depth_folder, tmp_path / "depth")
    nothing = [None, None]
    edit(folder / "model_index.json", depth_estimator=nothing, feature_extractor=nothing)
    stages, whole = FamilyStages(folder, "control"), FamilyStages(depth_folder, "control")
    given = batch([0, 1, 2], call(strength=0.7), DEPTHS)
    assert np.array_equal(stages.fused(given).pixels, whole.fused(given).pixels)
    with pytest.raises(ValueError, match=r"no depth_estimator .* give every row a depth map"):
        stages.fused(batch([0, 1, 2], call(strength=0.7), PICTURES))


def test_depth_without_an_image_is_refused(depth_folder: Path) -> None:
    stages = FamilyStages(depth_folder, "control")
    maps = {"control": DEPTHS["control"]}
    with pytest.raises(
        ValueError, match=r"needs an image for every row; set input\.columns\.image"
    ):
        stages.fused(batch([0, 1, 2], call(strength=0.7), maps))


def test_columns_for_depth(depth_folder: Path) -> None:
    stages = FamilyStages(depth_folder, "control")

    def check(**columns: str) -> None:
        mapped = type(stages.spec.input.columns)(prompt="prompt", **columns)
        source = stages.spec.input.model_copy(update={"columns": mapped})
        check_fit(stages.spec.model_copy(update={"input": source}), stages.info)

    check(image="image")
    check(image="image", control="depth")
    with pytest.raises(SpecError, match=r"input\.columns\.image: .* a column: a depth-to-image"):
        check(control="depth")


@pytest.mark.parametrize(
    ("pipeline", "task", "wanted"), [(EDIT, "image-edit", 8), (DEPTH, "control", 5)]
)
def test_a_model_of_four_channels_is_refused(
    tmp_path: Path, pipeline: str, task: str, wanted: int
) -> None:
    folder = build_stable_diffusion(tmp_path / "plain")
    edit(folder / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelError, match=f"unet takes 4 channels, .* for {task} takes {wanted} "):
        models.inspect(Model(path=str(folder)), task)


def test_a_model_for_edits_is_refused_elsewhere(edit_folder: Path) -> None:
    with pytest.raises(ModelError, match=f"is a {EDIT}; it fits image-edit"):
        models.inspect(Model(path=str(edit_folder)), "image-to-image")
