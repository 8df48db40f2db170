"""Offloaded stages give the same bytes: every family, on a fake device and on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.models.tiny import BUILDERS
from tests.fake_offload import WeightsDevice
from tests.model.test_offload import (
    EARLY,
    FEW,
    device,
    hooks_change_no_byte,
    weights_come_when_needed,
)

pytestmark = pytest.mark.long
OTHERS = sorted(set(BUILDERS) - set(FEW))
__all__ = ["device"]


@pytest.mark.parametrize(("task", "name"), OTHERS)
def test_weights_come_when_they_are_needed(
    tmp_path: Path, device: WeightsDevice, task: str, name: str
) -> None:
    weights_come_when_needed(tmp_path, device, task, name, EARLY.get(name, 1.0))


@pytest.mark.parametrize(("task", "name"), OTHERS)
def test_hooks_change_no_byte(tmp_path: Path, task: str, name: str) -> None:
    hooks_change_no_byte(tmp_path, task, name)
