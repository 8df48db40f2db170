"""The memory of every family and every scheduler can be computed from configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families import FAMILIES
from batchgen.families.schedulers import SCHEDULERS
from batchgen.models import memory, memory_measure
from batchgen.models.memory import FUSED
from batchgen.models.tiny import BUILDERS
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.spec.build import build
from tests.model.test_memory import FEW, Measured, near_to_what_torch_allocates, tiny

__all__ = ["tiny"]  # a fixture
pytestmark = pytest.mark.long
COMPARED = (
    ("text-to-image", "stable-diffusion-xl"),
    ("text-to-image", "stable-diffusion-3"),
    ("text-to-image", "ldm-bert"),
    ("inpainting", "stable-diffusion"),
    ("control", "controlnet"),
)
OTHERS = [(one.task, one.name) for one in FAMILIES if (one.task, one.name) not in FEW + COMPARED]


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
