"""Progress: correct rates, readable durations, and bars only on terminals."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.attempts import Attempts, News
from batchgen.output import tally as tally_module
from batchgen.output.outcome import outcome_of
from batchgen.output.tally import Tally, duration, figure
from batchgen.progress import display as progress_module
from batchgen.progress.bars import ECHO
from batchgen.progress.display import LOG_EVERY_S, Progress


class Clock:
    """A clock that the test moves."""

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
    monkeypatch.setattr(tally_module, "time", clock)
    return clock


def tally_at(clock: Clock, shards: int = 10, samples: int = 100) -> Tally:
    return Tally(shards, samples, since=clock.now_s)


def finish(tally: Tally, clock: Clock, after_s: float, samples: int, rejected: int = 0) -> None:
    """The next shard is committed."""
    clock.now_s += after_s
    tally.end_shard(tally.committed)
    tally.committed += 1
    tally.accepted += samples - rejected
    tally.accepted_now += samples - rejected
    tally.rejected += rejected
    tally.made += samples


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


def test_figures() -> None:
    shown = [figure(number) for number in (0, 9.44, 99.94, 123.4, 12345)]
    assert shown == ["0.0", "9.4", "99.9", "123", "12,345"]


def test_nothing_is_known_before_the_first_micro_batch(clock: Clock) -> None:
    tally = tally_at(clock)
    assert (tally.rate, tally.overall_rate, tally.eta_s) == (0.0, 0.0, None)
    clock.now_s += 50
    tally.hear({}, 3.0)
    assert (tally.rate, tally.eta_s, tally.start_up_s) == (0.0, None, 47.0)


def test_the_first_micro_batch_promises_an_end(clock: Clock) -> None:
    """31 s of start-up, then 8 images in 4 s, of 100."""
    tally = tally_at(clock)
    clock.now_s += 35
    tally.hear({0: 8}, 4.0)
    assert tally.made_so_far == 8 and tally.finished_samples == 0
    assert tally.rate == pytest.approx(2.0)
    assert tally.eta_s == pytest.approx(92 / 2)
    assert tally.start_up_s == pytest.approx(31)


def test_the_outcome_has_the_rate_with_and_without_start_up(clock: Clock) -> None:
    tally = tally_at(clock)
    before = outcome_of(tally, tally, "out", 0, "")
    assert (before.start_up_s, before.images_per_second_after_start_up) == (None, None)
    clock.now_s += 30
    tally.hear({}, 0.0)
    finish(tally, clock, 10, 20)
    outcome = outcome_of(tally, tally, "out", 0, "")
    assert (outcome.seconds, outcome.start_up_s) == (40.0, 30.0)
    assert (outcome.images_per_second, outcome.images_per_second_after_start_up) == (0.5, 2.0)


def test_what_is_committed_is_under_way_no_more(clock: Clock) -> None:
    tally = tally_at(clock)
    tally.hear({0: 8, 1: 2}, 0.0)
    finish(tally, clock, 4, 10)
    assert tally.made_so_far == 12
    tally.hear({0: 8, 1: 4}, 4.0)  # told before the holder knew that shard 0 has ended
    assert tally.made_so_far == 14
    tally.hear({1: 2}, 4.0)  # its worker died, and another began it again
    assert tally.made_so_far == 12


def test_more_under_way_than_planned_is_not_shown(clock: Clock) -> None:
    tally = tally_at(clock, shards=2, samples=20)
    finish(tally, clock, 4, 10)
    tally.hear({1: 10, 7: 10}, 1.0)
    assert tally.made_so_far == 20


def test_nothing_is_left_when_all_is_made(clock: Clock) -> None:
    tally = tally_at(clock, shards=1, samples=10)
    finish(tally, clock, 20, 10)
    assert tally.eta_s == 0


def test_start_up_does_not_count_but_in_the_overall_rate(clock: Clock) -> None:
    """A minute of start-up, then 10 samples each 2 s."""
    tally = tally_at(clock, shards=1000, samples=10_000)
    clock.now_s += 60
    tally.hear({}, 0.0)
    for _ in range(60):
        finish(tally, clock, 2, 10)
    assert tally.rate == pytest.approx(5.0)
    assert tally.overall_rate == pytest.approx(600 / 180)
    assert tally.eta_s == pytest.approx((10_000 - 600) / 5)


def test_replicas_that_end_together_do_not_show_a_burst(clock: Clock) -> None:
    """8 replicas make 64 samples each 10 s and end within milliseconds: 51 a second, not 64,000."""
    tally = tally_at(clock, shards=1000, samples=64_000)
    tally.hear({}, 0.0)
    for wave in range(6):
        for replica in range(8):
            finish(tally, clock, 10 if replica == 0 else 0.001, 64)
            assert tally.rate < 1.01 * 51.2, (wave, replica)
    assert tally.rate == pytest.approx(51.2, rel=0.01)


def test_what_an_earlier_run_made_is_not_this_runs_speed(clock: Clock) -> None:
    tally = Tally(10, 100, committed=5, accepted=50, since=clock.now_s)
    assert tally.eta_s is None
    tally.hear({}, 0.0)
    finish(tally, clock, 10, 10)
    assert (tally.overall_rate, tally.rate, tally.eta_s) == (1.0, 1.0, 40.0)


def test_rates_are_of_images_and_the_end_is_of_samples(clock: Clock) -> None:
    """Rejected rows take no time: they do not count for the rate, but they are finished."""
    tally = tally_at(clock)
    tally.hear({}, 0.0)
    finish(tally, clock, 10, 20, rejected=15)
    assert (tally.rate, tally.overall_rate) == (0.5, 0.5)
    assert tally.eta_s == 40.0


def test_the_summary_says_both_rates_and_stays(clock: Clock) -> None:
    tally = tally_at(clock, shards=1, samples=600)
    clock.now_s += 31
    tally.hear({}, 0.0)
    finish(tally, clock, 22, 600, rejected=100)
    tally.end()
    clock.now_s += 1000
    assert tally.summary == "500 images in 53s (9.4/s; 22.7/s after 31s of start-up)"
    assert tally.overall_rate == pytest.approx(500 / 53)


def test_the_summary_of_one_image_and_of_none(clock: Clock) -> None:
    tally = tally_at(clock)
    clock.now_s += 10
    assert tally.summary == "0 images in 10s (0.0/s)"
    finish(tally, clock, 0, 1)
    assert tally.summary == "1 image in 10s (0.1/s)"


def test_all_in_one_instant_divides_by_no_zero(clock: Clock) -> None:
    tally = tally_at(clock)
    for _ in range(3):
        finish(tally, clock, 0, 10)
    assert math.isfinite(tally.rate)
    assert tally.eta_s is not None and math.isfinite(tally.eta_s)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6)), min_size=1, max_size=20))
def test_rates_are_finite_and_never_negative(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    tally = Tally(len(steps), sum(made for _, made in steps), since=clock.now_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally_module, "time", clock)
        for after_s, made in steps:
            tally.hear({tally.committed: made // 2}, after_s)
            assert tally.eta_s is None or 0 <= tally.eta_s < math.inf
            finish(tally, clock, after_s, made)
            assert tally.rate > 0
            assert math.isfinite(tally.rate)
            assert tally.eta_s is not None and 0 <= tally.eta_s < math.inf
    assert tally.finished_samples == tally.samples
    assert tally.eta_s == 0


def test_the_line_tells_all(clock: Clock) -> None:
    tally = Tally(8000, 10_000, rejected=3, failed=7, failed_shards=1, since=clock.now_s)
    tally.hear({}, 0.0)
    finish(tally, clock, 10, 20)
    finish(tally, clock, 10, 1980)
    assert Progress(tally, stream=io.StringIO()).line() == (
        "12:34:56 shards 3/8,000 · images 2,010/10,000 · 100 images/s · ETA 1m20s · "
        "rejected 3 · failed 7"
    )


def test_the_line_at_the_end_says_how_long_it_took(clock: Clock) -> None:
    tally = tally_at(clock, shards=1, samples=10)
    finish(tally, clock, 20, 10)
    line = Progress(tally, stream=io.StringIO()).line()
    assert "images 10/10 · 0.5 images/s · 20s in all" in line


def test_phases_are_said_until_something_is_made(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(tally_at(clock), stream=stream) as progress:
        progress.enter_phase("starting Ray")
        progress.enter_phase("loading toy on 2 replicas (CPU)")
        assert "images 0/100 · loading toy on 2 replicas (CPU) · rejected 0" in progress.line()
        clock.now_s += 31
        progress.hear(News(["a replica is slow"], {}, 1.0))
        progress.hear(News([], {0: 8}, 1.0))
        assert "images 8/100 · 8.0 images/s · ETA 12s" in progress.line()
    assert [line[9:] for line in stream.getvalue().splitlines() if "shards" not in line] == [
        "starting Ray",
        "loading toy on 2 replicas (CPU)",
        "a replica is slow",
        "generating, after 30s of start-up",
    ]


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
        progress.show()
    lines = stream.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        "12:34:56 shards 0/3",
        "12:34:56 shards 2/3",
        "12:34:56 shards 3/3",
    ]


def test_the_record_of_attempts_tells_what_is_under_way() -> None:
    record = Attempts()
    assert record.news(0) == News([], {}, None)
    record.begin_first("Generate", 3, "node")
    record.made(3, 8)
    record.made(4, 2)
    record.made(3, 16)
    record.say("a word")
    news = record.news(0, ended=[4, 9])
    assert (news.said, news.under_way) == (["a word"], {3: 16})
    assert news.began_before_s is not None and 0 <= news.began_before_s < 10
    assert record.news(1).said == []


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


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def shown_on(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_a_terminal_has_bars_and_said_lines(terminal: Terminal) -> None:
    tally = Tally(4, 4000)
    with Progress(tally, stream=terminal) as progress:
        progress.enter_phase("starting Ray")
        progress.say("shard 3 failed: [odd] \x1b]0;text\x07")
        tally.committed, tally.accepted, tally.rejected = 4, 3997, 3
        progress.show()
    text = shown_on(terminal)
    assert r"shard 3 failed: [odd] \x1b]0;text\x07" in text
    assert "4/4" in text
    assert "4,000/4,000" in text
    assert "rejected 3 · failed 0" in text
    assert progress.said[0].endswith("starting Ray")


RED, GREEN = "\x1b[31m", "\x1b[38;5;70m"


@pytest.mark.parametrize(("rejected", "bad"), [(0, False), (10, False), (11, True), (100, True)])
def test_a_bar_is_green_only_within_the_limits(
    terminal: Terminal, rejected: int, bad: bool
) -> None:
    tally = Tally(1, 100, failed_limit=0.01, rejected_limit=0.1)
    with Progress(tally, stream=terminal) as progress:
        tally.committed, tally.accepted, tally.rejected = 1, 100 - rejected, rejected
        progress.show()
    assert ((RED + "━") in terminal.getvalue()) == bad
    assert ((GREEN + "━") in terminal.getvalue()) != bad


def test_the_phase_stands_beside_the_bars(terminal: Terminal) -> None:
    with Progress(Tally(4, 4000), stream=terminal) as progress:
        progress.enter_phase("starting Ray")
    assert "0/4,000 starting Ray " in shown_on(terminal)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_echo_of_an_interrupt_wraps_no_line(
    columns: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal prints ^C after the last line; a full line would wrap and be drawn twice."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(Tally(15_625, 1_000_000), stream=terminal) as progress:
        progress.enter_phase(
            "loading stabilityai/stable-diffusion-xl-base-1.0 on 64 replicas (A100)"
        )
    lines = shown_on(terminal).replace("\r", "\n").splitlines()
    assert any("images " in line and "0/1,000,000 load" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= columns - ECHO
