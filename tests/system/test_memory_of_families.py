"""The memory of every family and every scheduler can be computed from configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen import models
from batchgen.families import FAMILIES
from batchgen.families.schedulers import SCHEDULERS
from batchgen.models import memory_measure
from batchgen.models.memory import FUSED
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.spec.build import build
from tests.model.test_memory import CASES, Measured, tiny

__all__ = ["tiny"]  # a fixture
pytestmark = pytest.mark.long
OTHERS = [(one.task, one.name) for one in FAMILIES if (one.task, one.name) not in CASES]


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
            "model": {"path": str(tiny), "scheduler": scheduler},
        }
    )
    info = models.inspect(spec.model, spec.task)
    spec = settle(spec, info)
    need = memory_measure.measure(info, spec, usual_call(spec, info))
    assert need.stages["denoise"].image_bytes > 0
