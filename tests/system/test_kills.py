"""After replicas or Ray itself were killed, the bytes are those of an undisturbed run; Ctrl-C.

Killed drivers: `tests/ray/test_crash.py`. Many kills: `python -m tests.chaos.kill`.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.chaos.kill import (
    command,
    kill_daemons,
    kill_replicas,
    markers,
    quiet_run,
    start,
    wait_until,
    write_prompts,
)

STEPS = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiet_run(tmp_path_factory.mktemp("kills"), shards=6, steps=STEPS)


def test_a_killed_replica_loses_and_changes_nothing(source: Path) -> None:
    dice = random.Random(3)
    tally = kill_replicas(source, source.parent / "replicas", kills=1, steps=STEPS, dice=dice)
    assert tally.clean and tally.kills == 1, tally
    assert tally.exit_codes == [0]


@pytest.mark.long
def test_killed_daemons_of_ray_lose_and_change_nothing(source: Path) -> None:
    tally = kill_daemons(source, source.parent / "daemons", STEPS)
    assert tally.clean and tally.kills == 2, tally
    assert tally.exit_codes == [3, 3, 0]


def test_an_interrupted_run_says_how_to_resume(tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.parquet", tmp_path / "out"
    write_prompts(source, 400)
    process = start(command(source, output, 16, replicas=1), tmp_path / "log")
    assert wait_until(lambda: markers(output) >= 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 3
    log = (tmp_path / "log").read_text()
    assert f"continue with `batchgen resume {output}`" in log
    assert "Traceback" not in log and "infinite retries" not in log
    ledger = Ledger(open_store(str(output)))
    assert ledger.states(ledger.require_plan()).pending
    # Ended between a shard's data and its marker, the file stands there until it is made again.
    expected = ("pending", "planned", "belongs to no committed shard")
    assert not [p for p in verify(ledger).problems if not any(word in p for word in expected)]
