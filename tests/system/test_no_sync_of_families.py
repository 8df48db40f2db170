"""Sampling loops never wait for the device: every family with every scheduler that it supports."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.models.tiny import BUILDERS
from tests.model.test_no_sync import FEW, no_step_waits

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("task", "name"), sorted(set(BUILDERS) - set(FEW)))
def test_no_step_waits(tmp_path: Path, task: str, name: str) -> None:
    no_step_waits(tmp_path, task, name)
