"""Models that cannot be used are refused with a clear message."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from batchgen import models
from batchgen.families import family_named
from batchgen.models import inspection
from tests.model_folders import IMAGE, TEXT, edit, inspect, refusal, spec_of
from tests.tiny_models import build_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def test_names_that_are_nothing_are_refused(tmp_path: Path) -> None:
    message = refusal("no-such-model")
    assert "'no-such-model': no such folder" in message
    assert "not a hub id of the form owner/name" in message
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "is a file; needed: a folder in diffusers layout" in refusal(file)


def test_a_revision_of_a_local_folder_is_refused(saved: Path) -> None:
    assert "which has no revisions" in refusal(saved, revision="main")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    assert "has no model_index.json" in refusal(tmp_path)
    for wrong in ("[]", "{", "\xff"):
        (tmp_path / "model_index.json").write_text(wrong, encoding="latin-1")
        assert "model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_other_pipelines_are_refused_and_the_usable_named(folder: Path, task: str) -> None:
    edit(folder / "model_index.json", _class_name="AudioLDMPipeline")
    message = refusal(folder, task)
    assert f"is a AudioLDMPipeline; allowed for {task}: " in message
    assert ": StableDiffusionPipeline, " in message and " more (`batchgen tasks " in message
    edit(folder / "model_index.json", _class_name=["pipeline", "Custom"])
    assert "['pipeline', 'Custom']" in refusal(folder, task)


def test_either_pipeline_serves_either_task(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    for task in (TEXT, IMAGE):
        ready = spec_of(folder, task)
        denoiser = models.load_denoiser(inspect(folder, task), ready)
        expected = diffusers.StableDiffusionPipeline
        if task == IMAGE:
            expected = diffusers.StableDiffusionImg2ImgPipeline
        assert type(denoiser.pipeline) is expected


@pytest.mark.parametrize("component", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_missing_component_is_named(folder: Path, component: str) -> None:
    shutil.move(folder / component, folder / "away")
    assert refusal(folder) == f"{component}: the folder {folder / component} is missing"
    edit(folder / "model_index.json", **{component: [None, None]})
    assert refusal(folder).startswith(f"{component}: ")
    edit(folder / "model_index.json", **{component: ["my_code", "Own"]})
    assert "my_code.Own" in refusal(folder)
    assert "code that comes with a model is never run" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refusal(folder)
    assert message.startswith(name.split("/")[0])
    assert str(folder / name) in message


def test_pickled_weights_alone_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(folder)
    assert message.startswith("unet: the weights ")
    assert (
        "diffusion_pytorch_model.bin cannot be used; allowed: safetensors, and .bin with" in message
    )


def test_weights_under_a_name_that_would_not_be_loaded_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("model.safetensors"))
    assert "found: model.safetensors" in refusal(folder)


def test_empty_weights_and_missing_parts_are_refused(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "diffusion_pytorch_model.safetensors are missing or empty" in refusal(folder)
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "vae" / "diffusion_pytorch_model-00001-of-00002.safetensors",
    )
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    second = "diffusion_pytorch_model-00002-of-00002.safetensors"
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": second}}))
    assert f"{folder / 'vae' / second} are missing or empty" in refusal(folder)


def test_a_variant_that_is_not_there_is_refused(saved: Path) -> None:
    message = refusal(saved, variant="fp16")
    assert "model.fp16.safetensors are missing" in message
    assert "found: model.safetensors (model.variant is 'fp16')" in message


def test_a_denoiser_of_another_name_is_checked_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = replace(
        family_named(TEXT, "stable-diffusion"),
        denoiser=("scheduler", "prior_unet"),
        size=("prior_unet", "sample_size"),
    )
    monkeypatch.setattr(inspection, "FAMILIES", (odd,))
    (folder / "unet").rename(folder / "prior_unet")
    index = folder / "model_index.json"
    edit(index, unet=None, prior_unet=json.loads(index.read_text())["unet"])
    assert inspect(folder).width == 32
    config = folder / "prior_unet" / "config.json"
    edit(config, in_channels=9)
    assert "prior_unet takes 9 channels, but a stable-diffusion model" in refusal(folder)
    edit(config, in_channels=None)
    assert refusal(folder).startswith(
        f"scheduler, prior_unet: no configuration in {folder / 'scheduler'}, "
        f"{folder / 'prior_unet'} has 'in_channels'"
    )


def test_parts_that_do_not_fit_are_refused(folder: Path) -> None:
    unet = folder / "unet" / "config.json"
    edit(unet, in_channels=9)
    assert (
        "unet takes 9 channels, but a stable-diffusion model for text-to-image takes 4"
        in refusal(folder)
    )
    edit(unet, in_channels=4, cross_attention_dim=768)
    assert "embeddings of width 768, but text_encoder gives 32" in refusal(folder)
    edit(unet, cross_attention_dim=32, sample_size=None)
    assert "unet: " in refusal(folder)
    assert "has no 'sample_size'" in refusal(folder)
    edit(unet, sample_size=8)
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert "but text_encoder reads only 16 tokens" in refusal(folder)


def test_latents_that_pass_for_pixels_are_refused_for_images(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "eight", channels=8)
    assert inspect(folder).latent_channels == 8
    assert refusal(folder, IMAGE).startswith(
        "vae has 8 latent channels; allowed for image-to-image: 4"
    )


def test_schedulers_are_checked_by_name(folder: Path) -> None:
    message = refusal(folder, scheduler="DDIMSchedular")
    assert "got 'DDIMSchedular'; allowed: DDIMScheduler, " in message
    assert "did you mean 'DDIMScheduler'?" in message
    for name in models.REFUSED_SCHEDULERS:
        assert f"scheduler {name} cannot be used: it draws noise" in refusal(folder, scheduler=name)
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    assert "DPMSolverSDEScheduler cannot be used" in refusal(folder)
    assert inspect(folder, scheduler="DDIMScheduler").scheduler == "DDIMScheduler"


@pytest.mark.parametrize("name", [*models.SCHEDULERS, *models.REFUSED_SCHEDULERS])
def test_scheduler_names_are_those_of_diffusers(name: str) -> None:
    assert isinstance(getattr(diffusers, name), type)
