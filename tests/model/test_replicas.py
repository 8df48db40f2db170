"""Models are found, described and loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from batchgen import models
from batchgen.errors import ModelError
from batchgen.records import ModelInfo, tupled
from tests.model_folders import IMAGE, TEXT, edit, inspect, refusal, run_python, spec_of
from tests.tiny_models import build_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


# --- what is known of a model --------------------------------------------------------------------


def test_a_local_folder_is_described(saved: Path) -> None:
    info = inspect(saved)
    assert info == ModelInfo(
        model_id=str(saved),
        path=str(saved.resolve()),
        revision=f"sha256:{info.manifest_sha256[:12]}",
        manifest_sha256=info.manifest_sha256,
        pipeline_class="StableDiffusionPipeline",
        family="stable-diffusion",
        scheduler="PNDMScheduler",
        latent_channels=4,
        vae_scale_factor=4,
        width=32,
        height=32,
        multiple_of=4,
        num_inference_steps=25,
        guidance_scale=7.5,
        settings=("eta",),
    )
    assert len(info.manifest_sha256) == 64
    values = json.loads(json.dumps(asdict(info)))
    assert ModelInfo(**{name: tupled(value) for name, value in values.items()}) == info


def test_the_scheduler_of_the_spec_is_in_effect(saved: Path) -> None:
    assert inspect(saved, scheduler="DDIMScheduler").scheduler == "DDIMScheduler"


def test_a_model_recommends_its_own_settings(folder: Path) -> None:
    path = folder / "batchgen.json"
    path.write_text('{"num_inference_steps": 12, "guidance_scale": 2, "more": []}')
    info = inspect(folder)
    assert (info.num_inference_steps, info.guidance_scale) == (12, 2.0)
    path.write_text('{"guidance_scale": 1.5}')
    assert (inspect(folder).num_inference_steps, inspect(folder).guidance_scale) == (25, 1.5)
    for wrong in (
        '{"num_inference_steps": 0}',
        '{"guidance_scale": "2"}',
        '{"guidance_scale": -1}',
    ):
        path.write_text(wrong)
        assert "batchgen.json" in refusal(folder)


def test_a_native_size_may_be_oblong(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[6, 10])
    info = inspect(folder)
    assert (info.height, info.width) == (24, 40)


def test_the_manifest_is_that_of_the_files_that_would_be_loaded(folder: Path) -> None:
    before = inspect(folder)
    (folder / "README.md").write_text("hello")
    (folder / "unet" / "old.bin").write_text("hello")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    assert inspect(folder).manifest_sha256 == before.manifest_sha256
    seen = {before.manifest_sha256}
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        seen.add(inspect(folder).manifest_sha256)
        path.write_bytes(data)
    assert len(seen) == 6
    moved = shutil.copytree(folder, folder.parent / "moved")
    assert inspect(moved).manifest_sha256 == before.manifest_sha256


def test_a_variant_is_found_and_loaded(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "v", variant="fp16", dtype=torch.float16)
    assert "unet" not in refusal(folder)  # the first one named is the text encoder
    assert "found: model.fp16.safetensors (model.variant is None)" in refusal(folder)
    info, ready = inspect(folder, IMAGE, variant="fp16"), spec_of(folder, IMAGE, variant="fp16")
    for load in (models.load_encoder, models.load_denoiser, models.load_decoder):
        assert parameter_dtypes(load(info, ready)) == {torch.float32}


def parameter_dtypes(stage: Any) -> set[torch.dtype]:
    parts = [p for p in stage.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert parts
    return {parameter.dtype for part in parts for parameter in part.parameters()}


def test_the_shipped_models_are_found_by_name(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("batchgen.models.find.SHIPPED", folder.parent)
    assert models.shipped_names() == ["tiny"]
    info = inspect("tiny")
    assert (info.model_id, info.path) == ("tiny", str(folder))
    assert "no shipped model of that name (tiny; did you mean 'tiny'?)" in refusal("tinny")


def test_inspecting_imports_no_torch(saved: Path) -> None:
    code = (
        "import sys; from batchgen import models; from batchgen.spec.model import Model\n"
        f"print(models.inspect(Model(path={str(saved)!r}), 'text-to-image').scheduler)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run_python(code, {})
    assert (done.returncode, done.stdout) == (0, "PNDMScheduler\n"), done.stderr


# --- what is loaded ------------------------------------------------------------------------------


def stored(folder: Path, component: str, *prefixes: str) -> int:
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    return sum(t.numel() for name, t in tensors.items() if name.startswith(prefixes or ("",)))


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_each_stage_holds_only_its_parts(saved: Path, task: str) -> None:
    info, ready = inspect(saved, task), spec_of(saved, task)
    encoder = models.load_encoder(info, ready)
    denoiser = models.load_denoiser(info, ready)
    decoder = models.load_decoder(info, ready)
    expected = {"text_encoder": stored(saved, "text_encoder")}
    if task == IMAGE:
        expected["vae"] = stored(saved, "vae", "encoder.", "quant_conv.")
    assert models.parameter_counts(encoder) == expected
    assert models.parameter_counts(denoiser) == {"unet": stored(saved, "unet")}
    kept = stored(saved, "vae", "decoder.", "post_quant_conv.")
    assert models.parameter_counts(decoder) == {"vae": kept}
    assert encoder.pipeline.scheduler is decoder.pipeline.scheduler is None
    assert denoiser.pipeline.tokenizer is None
    assert denoiser.batch_size == decoder.batch_size == 2


def test_parts_are_frozen_and_in_eval(saved: Path) -> None:
    info, ready = inspect(saved, IMAGE), spec_of(saved, IMAGE)
    for load in (models.load_encoder, models.load_denoiser, models.load_decoder):
        for part in load(info, ready).pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                assert not any(module.training for module in part.modules())
                assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_part_gets_the_asked_dtype_whatever_was_stored(tmp_path: Path, dtype: str) -> None:
    folder = build_model(tmp_path / "half", dtype=torch.float16)
    info, ready = inspect(folder, IMAGE), spec_of(folder, IMAGE, dtype=dtype)
    for load in (models.load_encoder, models.load_denoiser, models.load_decoder):
        assert parameter_dtypes(load(info, ready)) == {getattr(torch, dtype)}


def test_the_scheduler_is_replaced_with_the_models_own_configuration(saved: Path) -> None:
    ready = spec_of(saved, scheduler="EulerDiscreteScheduler")
    scheduler = models.load_denoiser(inspect(saved), ready).pipeline.scheduler
    assert isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.steps_offset == 1


def test_loading_and_running_say_nothing(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0)  # an outdated file
    code = (
        "from batchgen import models; from batchgen.spec.build import build\n"
        "from batchgen.records import Call, ConditionBatch, Sample\n"
        "ready = build({'input': {'path': 'x'}, 'output': {'url': 'y'},"
        f" 'model': {{'path': {str(folder)!r}, 'dtype': 'float32'}}}})\n"
        "info = models.inspect(ready.model, ready.task)\n"
        "stages = [load(info, ready) for load in (models.load_encoder,"
        " models.load_denoiser, models.load_decoder)]\n"
        "value = ConditionBatch((Sample('k', 's', 0, 0, 1, 'long ' * 50, '',"
        " Call(2, 3.0, None, 32, 32)),), None)\n"
        "for stage in stages: value = stage(value)\n"
        "assert value.truncated == (True,)\n"
    )
    done = run_python(code, {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_that_is_not_here_is_found_again_by_name(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("batchgen.models.find.SHIPPED", folder.parent)
    ready = spec_of(Path("tiny"))
    info = replace(inspect("tiny"), path="/of/the/machine/that/planned")
    assert models.load_decoder(info, ready).batch_size == 2
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    info = replace(info, path="/of/another/machine")
    with pytest.raises(
        ModelError, match="is not the planned one: the SHA-256 of its files begins with"
    ):
        models.load_decoder(info, ready)


def test_a_folder_that_changed_since_the_plan_is_refused(folder: Path) -> None:
    info = inspect(folder)
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.03)
    with pytest.raises(
        ModelError, match="is not the planned one: the SHA-256 of its files begins with"
    ):
        models.load_denoiser(info, spec_of(folder))


def test_a_local_folder_that_is_not_here_is_refused(saved: Path) -> None:
    info = replace(inspect(saved), path="/nowhere/tiny", model_id="/nowhere/tiny")
    with pytest.raises(ModelError, match="'/nowhere/tiny': no such folder"):
        models.load_decoder(info, spec_of(Path("/nowhere/tiny")))
