"""After kill -9 or Ctrl-C, `resume` ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen.engine.interrupt import interruptible
from batchgen.errors import Interrupted
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.chaos.kill import (
    command,
    kill_drivers,
    markers,
    quiet_run,
    start,
    wait_until,
    write_prompts,
)


def test_a_killed_driver_loses_and_changes_nothing(tmp_path: Path) -> None:
    source = quiet_run(tmp_path, shards=4, steps=16)
    tally = kill_drivers(source, tmp_path / "drivers", 1, 16, random.Random(3), replicas=1)
    assert tally.clean and tally.kills == 1, tally
    assert tally.exit_codes == [-signal.SIGKILL, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_become_an_interruption(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_lost_lease_interrupts_with_its_reason() -> None:
    with pytest.raises(Interrupted, match="taken over"), interruptible() as interrupt:
        interrupt("another run has taken over")
        signal.pause()


def test_watchdogs_that_speak_late_or_twice_kill_nobody() -> None:
    """The second signal came after the handler was removed and killed the run without a message."""
    seen: list[str] = []

    def watchdog() -> None:
        interrupts[0]("the first")
        interrupts[0]("the second")
        for _ in range(200):
            interrupts[0]("late")
            seen.append("alive")

    interrupts: list[Callable[[str], None]] = []
    thread = threading.Thread(target=watchdog)
    with pytest.raises(Interrupted, match="the first"), interruptible() as interrupt:
        interrupts.append(interrupt)
        thread.start()
        signal.pause()
    thread.join()
    interrupts[0]("after the end")
    assert len(seen) == 200


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
