"""Models, tasks and columns that do not fit are refused by `batchgen plan`, before any worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from batchgen.cli import main
from batchgen.models.tiny import control, ldm, stable_diffusion, stable_diffusion_xl, variation
from jobs import task_inputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    """Each tiny model, built once."""

    @cache
    def built(build: Callable[[Path], Path]) -> Path:
        return build(tmp_path_factory.mktemp("models") / build.__name__)

    return built


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    task_inputs.main(str(path))
    return path


def without_second_encoder(folder: Path) -> Path:
    """A refiner that lacks its second text encoder."""
    stable_diffusion_xl.build_refiner(folder)
    index = folder / "model_index.json"
    entries = {**json.loads(index.read_text()), "text_encoder_2": [None, None]}
    index.write_text(json.dumps(entries))
    shutil.rmtree(folder / "text_encoder_2")
    return folder


PROMPT = ("--prompt-column", "prompt")
IMAGE = ("--image-column", "image")
MASK = ("--mask-column", "mask")
WRONG: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], tuple[str, ...]]] = {
    "no mask for inpainting": (
        stable_diffusion.build_inpainting,
        ("--task", "inpainting", *IMAGE),
        ("input.columns.mask", "a column, for inpainting"),
    ),
    "a mask where none is read": (
        stable_diffusion.build_stable_diffusion,
        ("--task", "image-to-image", *IMAGE, *MASK),
        ("input.columns.mask", "image-to-image uses no mask; remove it, or use --task inpainting"),
    ),
    "a refiner without its second encoder": (
        without_second_encoder,
        ("--task", "image-to-image", *IMAGE),
        ("text_encoder_2", "model_index.json"),
    ),
    "a 9-channel U-Net in image-to-image": (
        stable_diffusion.build_inpainting,
        ("--task", "image-to-image", *IMAGE),
        ("unet takes 9 channels", "it fits inpainting"),
    ),
    "an 8-channel U-Net in text-to-image": (
        stable_diffusion.build_edit,
        ("--task", "text-to-image"),
        ("StableDiffusionInstructPix2PixPipeline", "it fits image-edit"),
    ),
    "an upscaler that should edit": (
        stable_diffusion.build_upscaler,
        ("--task", "image-edit", *IMAGE),
        ("StableDiffusionUpscalePipeline", "it fits super-resolution"),
    ),
    "no ControlNet": (
        stable_diffusion.build_stable_diffusion,
        ("--task", "control", "--control-column", "map"),
        ("controlnet", "model.components.controlnet"),
    ),
    "no control image": (
        control.build_controlnet,
        ("--task", "control"),
        ("input.columns.control", "1 column, one for"),
    ),
    "one control image too many": (
        control.build_controlnet,
        ("--task", "control", "--set", "input.columns.control=[map, image]"),
        ("input.columns.control", "1 column, one for"),
    ),
    "no regions for a layout model": (
        control.build_gligen,
        ("--task", "control"),
        ("input.columns.regions", "needs it"),
    ),
    "too few steps for a layout model": (
        control.build_gligen,
        ("--task", "control", "--steps", "2", "--set", "input.columns.regions=regions"),
        ("sampling.num_inference_steps", "at least 4"),
    ),
    "half a scheduler's name": (
        ldm.build_dit,
        ("--task", "class-conditional", "--class-column", "class_label", "--scheduler", "LMS"),
        ("scheduler", "LMS"),
    ),
    "a scheduler that the loop is not written for": (
        stable_diffusion.build_consistency,
        ("--task", "text-to-image", "--scheduler", "DDIMScheduler"),
        ("DDIMScheduler", "works only with LCMScheduler"),
    ),
    "a strength that the model does not read": (
        stable_diffusion.build_stable_diffusion,
        ("--set", "input.columns.strength=class_label"),
        ("input.columns.strength", "text-to-image uses no strength"),
    ),
    "noise for a model that takes none": (
        ldm.build_super_resolution,
        ("--task", "super-resolution", *IMAGE, "--set", "input.columns.noise_level=class_label"),
        ("input.columns.noise_level", "supported: eta"),
    ),
    "another size than the model's only one": (
        ldm.build_dit,
        ("--task", "class-conditional", "--class-column", "class_label", "--width", "64"),
        ("sampling.width", "the only width of this model"),
    ),
    "a LoRA column without LoRAs": (
        stable_diffusion.build_stable_diffusion,
        ("--set", "input.columns.lora=label"),
        ("input.columns.lora", "model.loras"),
    ),
    "an unknown maker": (
        stable_diffusion.build_stable_diffusion,
        ("--task", "image-to-image", *IMAGE, "--set", "conditioning.make={image: cany}"),
        ("conditioning.make.image", "did you mean 'canny'"),
    ),
    "a component that the family takes from nowhere else": (
        variation.build_image_variation,
        ("--task", "variation", *IMAGE, "--set", "model.components={unet: somewhere}"),
        ("model.components.unet", "allowed"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_while_planning(
    case: str, folders: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, words, said = WRONG[case]
    output = tmp_path / "out"
    given = ["plan", "--input", str(rows), "--output", str(output), "--model", str(folders(build))]
    with pytest.raises(SystemExit) as ended:
        main([*given, *words])
    message = capsys.readouterr().err
    assert ended.value.code == 1, message
    for word in said:
        assert word in message
    assert not output.exists()
