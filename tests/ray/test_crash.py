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
from tests.chaos.kill import (
    kill_drivers,
    quiet_run,
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
