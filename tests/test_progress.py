"""Progress: honest rates, readable durations, bars on terminals alone."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import progress as progress_module
from batchgen.progress import LOG_EVERY_S, Progress, Tally, duration


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def strftime(self, layout: str) -> str:
        return "12:34:56"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def tally_at(clock: Clock, shards: int = 10, samples: int = 100) -> Tally:
    return Tally(shards, samples, since=clock.now_s)


def finish(tally: Tally, clock: Clock, after_s: float, samples: int) -> None:
    clock.now_s += after_s
    tally.committed += 1
    tally.accepted += samples
    tally.add_made(samples)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0s"),
        (0.4, "0s"),
        (12.4, "12s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (185, "3m05s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3720, "1h02m"),
        (360_000, "100h00m"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_is_known_before_the_first_shard(clock: Clock) -> None:
    tally = tally_at(clock)
    assert (tally.rate, tally.overall_rate, tally.eta_s) == (0.0, 0.0, None)
    clock.now_s += 50
    assert (tally.rate, tally.eta_s) == (0.0, None)


def test_the_first_shard_counts_from_the_start_and_promises_nothing(clock: Clock) -> None:
    tally = tally_at(clock)
    finish(tally, clock, 20, 10)
    assert tally.rate == tally.overall_rate == 0.5
    assert tally.eta_s is None


def test_nothing_is_left_when_all_is_made(clock: Clock) -> None:
    tally = tally_at(clock, shards=1, samples=10)
    finish(tally, clock, 20, 10)
    assert tally.eta_s == 0


def test_start_up_does_not_count_for_long(clock: Clock) -> None:
    """A minute of start-up, then 10 samples each 2 s."""
    tally = tally_at(clock, shards=1000, samples=10_000)
    finish(tally, clock, 60, 10)
    for _ in range(60):
        finish(tally, clock, 2, 10)
    assert tally.rate == pytest.approx(5.0)
    assert tally.overall_rate == pytest.approx(610 / 180)
    assert tally.eta_s == pytest.approx((10_000 - 610) / 5)


def test_replicas_that_end_together_do_not_show_a_burst(clock: Clock) -> None:
    """8 replicas make 64 samples each 10 s and end within milliseconds: 51 a second, not 64,000."""
    tally = tally_at(clock, shards=1000, samples=64_000)
    for wave in range(6):
        for replica in range(8):
            finish(tally, clock, 10 if replica == 0 else 0.001, 64)
            assert tally.rate < 1.01 * 51.2, (wave, replica)
            assert wave == 0 or tally.rate > 0.5 * 51.2, (wave, replica)
    assert tally.rate == pytest.approx(51.2, rel=0.01)


def test_what_an_earlier_run_made_is_not_this_runs_speed(clock: Clock) -> None:
    tally = Tally(10, 100, committed=5, accepted=50, since=clock.now_s)
    assert tally.eta_s is None
    finish(tally, clock, 10, 10)
    assert tally.overall_rate == 1.0
    finish(tally, clock, 5, 10)
    assert (tally.rate, tally.eta_s) == (2.0, 15.0)


def test_all_in_one_instant_divides_by_no_zero(clock: Clock) -> None:
    tally = tally_at(clock)
    for _ in range(3):
        finish(tally, clock, 0, 10)
    assert math.isfinite(tally.rate)
    assert tally.eta_s is None


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6)), min_size=1, max_size=20))
def test_rates_are_finite_and_never_negative(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    tally = Tally(len(steps), sum(made for _, made in steps), since=clock.now_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_module, "time", clock)
        for after_s, made in steps:
            finish(tally, clock, after_s, made)
            assert tally.rate > 0
            assert math.isfinite(tally.rate)
            assert tally.eta_s is None or 0 <= tally.eta_s < math.inf
    assert tally.finished_samples == tally.samples
    assert tally.eta_s == 0


def test_the_line_tells_all(clock: Clock) -> None:
    tally = Tally(8, 100, rejected=3, failed=7, failed_shards=1, since=clock.now_s)
    finish(tally, clock, 10, 20)
    finish(tally, clock, 10, 40)
    assert Progress(tally, stream=io.StringIO()).line() == (
        "12:34:56 shards 3/8 · images 70/100 · 4.0 images/s · ETA 8s · rejected 3 · failed 7"
    )


def test_the_line_before_the_first_shard(clock: Clock) -> None:
    line = Progress(tally_at(clock), stream=io.StringIO()).line()
    assert "images 0/100 · 0.0 images/s · ETA -" in line


def test_lines_come_at_intervals_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    tally = tally_at(clock, shards=3)
    with Progress(tally, stream=stream) as progress:
        progress.show()
        progress.show()
        assert stream.getvalue().count("\n") == 1
        finish(tally, clock, LOG_EVERY_S - 1, 10)
        progress.show()
        assert stream.getvalue().count("\n") == 1
        finish(tally, clock, 1, 10)
        progress.show()
        assert stream.getvalue().count("\n") == 2
        finish(tally, clock, 0.1, 10)
        progress.show()
    lines = stream.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        "12:34:56 shards 0/3",
        "12:34:56 shards 2/3",
        "12:34:56 shards 3/3",
    ]


def test_what_is_said_stays(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(tally_at(clock), stream=stream) as progress:
        progress.say("shard 3 failed: [red]ValueError[/red]")
    assert stream.getvalue() == "12:34:56 shard 3 failed: [red]ValueError[/red]\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_prints_nothing(terminal: bool, clock: Clock) -> None:
    stream = Terminal() if terminal else io.StringIO()
    tally = tally_at(clock, shards=1)
    with Progress(tally, quiet=True, stream=stream) as progress:
        progress.show()
        progress.say("hello")
        finish(tally, clock, 60, 10)
        progress.show()
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_bars_and_said_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    tally = Tally(4, 40)
    with Progress(tally, stream=stream) as progress:
        progress.say("shard 3 failed: [odd] text")
        tally.committed, tally.accepted, tally.rejected = 4, 37, 3
        tally.add_made(40)
        progress.show()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "shard 3 failed: [odd] text" in text
    assert "4/4" in text
    assert "40/40" in text
    assert "rejected 3 · failed 0" in text
