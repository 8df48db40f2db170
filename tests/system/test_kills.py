"""After replicas or Ray itself were killed, the bytes are those of an undisturbed run.

Killed drivers: `tests/ray/test_crash.py`. Many kills: `python -m tests.chaos.kill`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.kill import kill_daemons, kill_replicas, quiet_run

STEPS = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiet_run(tmp_path_factory.mktemp("kills"), shards=6, steps=STEPS)


def test_a_killed_replica_loses_and_changes_nothing(source: Path) -> None:
    dice = random.Random(3)
    tally = kill_replicas(source, source.parent / "replicas", kills=1, steps=STEPS, dice=dice)
    assert tally.clean and tally.kills == 1, tally
    assert tally.exit_codes == [0]


def test_killed_daemons_of_ray_lose_and_change_nothing(source: Path) -> None:
    tally = kill_daemons(source, source.parent / "daemons", STEPS)
    assert tally.clean and tally.kills == 2, tally
    assert tally.exit_codes == [3, 3, 0]
