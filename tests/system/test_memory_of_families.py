"""The memory of every family and every scheduler can be computed from configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchgen import models
from batchgen.cli import main
from batchgen.errors import ModelError
from batchgen.families import FAMILIES
from batchgen.families.schedulers import SCHEDULERS
from batchgen.models import memory, memory_measure
from batchgen.models.memory import FUSED
from batchgen.models.tiny import BUILDERS
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.spec.build import build
from batchgen.spec.model import Model, Quantization
from tests.added_files import build_lora, named
from tests.fake_driver import answers, fake_smi, without_ray
from tests.model.test_memory import FEW, Measured, near_to_what_torch_allocates, tiny

__all__ = ["tiny"]  # a fixture
pytestmark = pytest.mark.long
SMALL_GPU = answers(["8.0, 200, Disabled, NVIDIA Small"])
COMPARED = (
    ("text-to-image", "stable-diffusion-xl"),
    ("text-to-image", "stable-diffusion-3"),
    ("text-to-image", "ldm-bert"),
    ("inpainting", "stable-diffusion"),
    ("control", "controlnet"),
)
OTHERS = [(one.task, one.name) for one in FAMILIES if (one.task, one.name) not in FEW + COMPARED]


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("task", "name"), COMPARED, ids=[f"{task}-{name}" for task, name in COMPARED]
)
def test_the_need_is_what_torch_allocates(task: str, name: str, tmp_path: Path) -> None:
    near_to_what_torch_allocates(task, name, tmp_path)


@pytest.mark.parametrize(("task", "name"), OTHERS, ids=[f"{task}-{name}" for task, name in OTHERS])
def test_every_family_can_be_measured(task: str, name: str, tmp_path: Path) -> None:
    need = Measured(task, name, tmp_path).need
    for stage in ("denoise", "decode"):
        assert need.stages[stage].weight_bytes > 0
        assert need.peak(FUSED, 2) > need.peak(FUSED, 1) > need.weights(FUSED)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_can_be_measured(scheduler: str, tiny: Path) -> None:
    spec = build(
        {
            "input": {"path": "x"},
            "output": {"url": "y"},
            "model": {"path": str(tiny), "scheduler": scheduler, "dtype": "float32"},
        }
    )
    info = models.inspect(spec.model, spec.task)
    spec = settle(spec, info)
    need = memory_measure.measure(info, spec, usual_call(spec, info))
    assert need.stages["denoise"].image_bytes > 0


def test_another_process_gives_the_same(tmp_path: Path) -> None:
    measured = Measured("text-to-image", "stable-diffusion", tmp_path)
    assert memory.need_of(measured.info, measured.spec, measured.call) == measured.need


def test_a_model_that_cannot_be_measured_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = BUILDERS["text-to-image", "stable-diffusion"](tmp_path / "model")
    model = {"path": str(path), "dtype": "float32"}
    spec = build({"input": {"path": "x"}, "output": {"url": "y"}, "model": model})
    info = models.inspect(spec.model, spec.task)
    call = usual_call(settle(spec, info), info)
    config = path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"CrossAttnDownBlock2D"', '"NoSuchBlock"'))
    with pytest.raises(ModelError, match=r"memory cannot be computed: ValueError: .*NoSuchBlock"):
        memory.need_of(info, spec, call)


def test_plan_and_doctor_compare_the_need_with_the_gpu(
    prompts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--input", str(prompts(12)), "--output", str(tmp_path / "out")]
    plain = CliRunner().invoke(main, ["plan", *words])
    assert plain.exit_code == 0 and "memory" not in plain.output
    said = CliRunner().invoke(main, ["plan", *words, "--memory"])
    assert said.exit_code == 0, said.output
    assert said.output.startswith(plain.output)
    assert re.search(
        r"memory of a replica: at batch size 8: encode .*iB, denoise .*iB, d", said.output
    )
    assert "largest batch size on a GPU: with 16 GiB: " in said.output
    without_ray(monkeypatch)
    fake_smi(tmp_path, SMALL_GPU, monkeypatch)
    found = CliRunner().invoke(main, ["doctor", *words, "--json"])
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    assert checks["memory of the GPU"]["grade"] == "warning"
    message = checks["memory of the GPU"]["message"]
    assert "NVIDIA Small has 200.0 MiB" in message and "no batch size fits" in message
    assert checks["memory of this machine"]["grade"] == "ok"


def test_adapters_and_quantization_change_the_weights(tmp_path: Path) -> None:
    name = ("text-to-image", "stable-diffusion")
    plain = Measured(*name, tmp_path)
    lora = build_lora(tmp_path / "model", tmp_path / "lora", 1, ("to_q", "q_proj"))
    section = Model(path=str(tmp_path / "model"), **named({"one": lora}))
    added = Measured(*name, tmp_path, loras=section.loras)
    for stage, _, weights, _ in added.real((2,)):
        assert added.need.stages[stage].weight_bytes == weights
    assert added.need.weights("denoise") > plain.need.weights("denoise")
    quantised = Quantization(backend="torchao", components=("unet",))
    small = Measured(*name, tmp_path, quantization=quantised)
    unet = models.load_denoiser(plain.info, plain.spec).pipeline.unet
    linear = [one.weight for one in unet.modules() if isinstance(one, torch.nn.Linear)]
    saved = sum(one.numel() for one in linear) * 3  # one byte instead of four
    assert small.need.weights("denoise") == plain.need.weights("denoise") - saved
    assert small.need.weights("decode") == plain.need.weights("decode")
