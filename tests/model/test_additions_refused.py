"""LoRAs, textual inversions and scheduler options that cannot be used are refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from batchgen import models
from batchgen.errors import ModelError, SpecError
from batchgen.models.tiny.stable_diffusion_xl import build_base
from batchgen.models.tiny.transformer import BUILDERS
from batchgen.models.tiny.variation import build_image_variation
from batchgen.spec.build import build
from batchgen.spec.tasks import parse_lora
from batchgen.spec.tree import merge
from tests.added_files import build_lora, named, token_file
from tests.family_stages import FamilyStages
from tests.model_folders import refusal, spec_of
from tests.tiny_models import build_model

TASK = "text-to-image"
build_flux = BUILDERS[TASK, "flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lora(folder, tmp_path_factory.mktemp("loras"), 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_karas_sigmas": True}, "did you mean 'use_karras_sigmas'?"),
        ({"steps_offset": "many"}, "got 'many'; allowed: a value like 0"),
        ({"steps_offset": True}, "got True; allowed: a value like 0"),
        ({"use_karras_sigmas": 1}, "got 1; allowed: a value like False"),
        ({"prediction_type": "noise"}, "allowed: epsilon, sample, v_prediction"),
        ({"timestep_spacing": "traling"}, "allowed: linspace, leading, trailing"),
    ],
)
def test_options_that_a_scheduler_does_not_take(
    folder: Path, options: dict[str, Any], told: str
) -> None:
    given = {"scheduler": "EulerDiscreteScheduler", "scheduler_options": options}
    message = refusal(folder, **given)
    assert f"model.scheduler_options.{next(iter(options))}" in message
    assert told in message


def test_noise_of_its_own_is_refused(tmp_path: Path) -> None:
    message = refusal(build_flux(tmp_path), scheduler_options={"stochastic_sampling": True})
    assert "a sample's seed does not fix its image" in message


def test_added_files_that_cannot_be_used(folder: Path, lora: Path, tmp_path: Path) -> None:
    def told(file: Path, **fields: Any) -> str:
        return refusal(folder, loras=[{"name": "a", "path": str(file), **fields}])

    assert "model.loras.0" in told(tmp_path / "none.safetensors")
    assert "no such file or folder" in told(tmp_path / "none.safetensors")
    assert "has no safetensors file" in told(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"pickled")
    assert "lora.bin cannot be used; only safetensors is allowed" in told(tmp_path)
    assert "only safetensors is allowed" in told(tmp_path / "lora.bin")
    assert "only safetensors is allowed" in told(tmp_path, weight_name="lora.bin")
    (tmp_path / "x.safetensors").write_bytes(b"not what it says it is")
    assert "is not a safetensors file" in told(tmp_path / "x.safetensors")
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "is not a LoRA: it has unet.conv.weight" in told(tmp_path)
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "y.safetensors")
    assert "name one with weight_name: x.safetensors, y.safetensors" in told(tmp_path)
    assert "is missing" in told(tmp_path, weight_name="z.safetensors")
    assert "has no revisions" in told(lora, revision="main")


def test_learned_tokens_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    def told(tensors: Mapping[str, torch.Tensor], **fields: Any) -> str:
        row = {"path": str(token_file(tmp_path, tensors)), **fields}
        return refusal(folder, textual_inversions=[row])

    wide = told({"<cat>": torch.zeros(2, 48)})
    assert "shape (2, 48), but those of text_encoder have the width 32" in wide
    assert "is not a textual inversion: it has a, b" in told(
        {"a": torch.zeros(1), "b": torch.zeros(1)}
    )
    assert "set model.textual_inversions.0.token" in told({"emb_params": torch.zeros(32)})
    two = {"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}
    assert "is for text_encoder_2, but this model has none" in told(two, token="<s>")


def test_a_token_that_is_there_already(folder: Path, tmp_path: Path) -> None:
    file = token_file(tmp_path, {"a": torch.zeros(32)})
    with pytest.raises(ModelError, match="Token a already in tokenizer vocabulary"):
        FamilyStages(folder, TASK, textual_inversions=[{"path": str(file)}])


def test_a_lora_of_another_model(folder: Path, tmp_path: Path) -> None:
    flux = build_lora(build_flux(tmp_path / "flux"), tmp_path / "lora", 1)
    with pytest.raises(ModelError, match=r"model\.loras\.0: .*it was trained for another model"):
        FamilyStages(folder, TASK, **named({"a": flux}))
    wider = build_lora(build_base(tmp_path / "xl"), tmp_path / "wider", 1, ("to_k",))
    with pytest.raises(
        ModelError, match=r"model\.loras\.0: .* cannot be used: .*size mismatch for"
    ):
        FamilyStages(folder, TASK, **named({"a": wider}))


def test_a_lora_that_changed_since_it_was_planned(folder: Path, tmp_path: Path) -> None:
    file = build_lora(folder, tmp_path, 1)
    ready = spec_of(folder, **named({"a": file}))
    info = models.inspect(ready.model, TASK)
    build_lora(folder, tmp_path, 2)
    with pytest.raises(ModelError, match="is not the planned one"):
        models.load_denoiser(info, ready)


def test_models_that_take_no_lora(lora: Path, tmp_path: Path) -> None:
    model = build_image_variation(tmp_path)
    told = refusal(model, "variation", **named({"a": lora}))
    assert "(StableDiffusionImageVariationPipeline) does not support a LoRA" in told


def test_the_text_of_a_row() -> None:
    known = {"style": 0.8, "face": 1.0}
    assert parse_lora("", known) == parse_lora("  ", known) == ()
    assert parse_lora("style, face : -0.5", known) == (("face", -0.5), ("style", 0.8))
    for text, told in (
        ("stile", "names of model.loras (face, style; did you mean 'style'?); got 'stile'"),
        ("style,", "got ''"),
        ("style,style:1", "style is named twice"),
        ("style:much", "with a weight of -10 to 10; got 'style:much'"),
        ("style:nan", "with a weight of -10 to 10"),
        ("style:11", "with a weight of -10 to 10"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            parse_lora(text, known)


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"model.loras": [{"name": "a", "path": "x"}] * 2}, "model", "is used twice"),
        ({"model.loras": [{"name": "a.b", "path": "x"}]}, "model.loras.0.name", "A-Z"),
        ({"model.loras": [{"name": "a", "pth": "x"}]}, "model.loras.0.path", "got nothing; needed"),
        ({"sampling.lora": "a"}, "sampling.lora", "names of model.loras (none)"),
        ({"model.ip_adapter": {"paht": "x"}}, "model.ip_adapter.path", "got nothing; needed"),
        (
            {"model.ip_adapter": {"path": "x", "scale": 1}},
            "model.ip_adapter.scale",
            "path, weight_name, revision, subfolder, image_encoder",
        ),
        (
            {"model.loras": [{"name": "a", "path": "s3://me:secret@host/x"}]},
            "model.loras.0.path",
            "a URL without it",
        ),
    ],
)
def test_specs_that_are_refused(fields: dict[str, Any], field: str, told: str) -> None:
    base = {"input": {"path": "x"}, "output": {"url": "y"}}
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        build(merge(base, fields))
    assert caught.value.field == field
    assert "secret" not in str(caught.value)
