"""What a person sees while a run works: bars on a terminal, a log line at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LOG_EVERY_S = 10.0
MOST_LINES = 2000
FIRST_WAVE = 0.25  # of the time to the first shard: what ends so soon after it is of its wave


@dataclass
class Tally:
    """Samples and shards by outcome; ``made`` and ``since`` tell the rate of this run alone."""

    shards: int
    samples: int
    committed: int = 0
    failed_shards: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    made: int = 0
    flawed_shards: int = 0  # committed, with failed samples in them
    failures_now: int = 0  # shards that failed, or were committed with flaws, in this run
    since: float = field(default_factory=time.monotonic)
    _first_at: float = 0.0
    _base: tuple[float, int] = (0.0, 0)  # when the first wave had ended, and what it had made

    @property
    def finished_samples(self) -> int:
        return self.accepted + self.rejected + self.failed

    def add_made(self, samples: int) -> None:
        """Samples that this run finished, at this moment."""
        now = time.monotonic()
        if not self.made:
            self._first_at = now
        self.made += samples
        if now - self._first_at <= FIRST_WAVE * (self._first_at - self.since):
            self._base = (now, self.made)

    @property
    def overall_rate(self) -> float:
        """Samples a second since the run began, start-up included."""
        return self.made / max(1e-9, time.monotonic() - self.since)

    @property
    def rate(self) -> float:
        """Samples a second since the first wave of shards, so that start-up does not count.

        Replicas that began together end together: counted from its first shard, the first wave
        would have been made in no time.
        """
        since, made = self._base
        if self.made == made:
            return self.overall_rate
        recent = (self.made - made) / max(1e-9, time.monotonic() - since)
        return max(recent, self.overall_rate)

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the rate so far; None until there is a rate without the start-up."""
        if self.finished_samples >= self.samples:
            return 0.0
        if self.made == self._base[1]:
            return None
        return (self.samples - self.finished_samples) / self.rate


def duration(seconds: float | None) -> str:
    """``1h02m``, ``3m05s``, ``12s``; ``-`` for None."""
    if seconds is None:
        return "-"
    minutes, left = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{left:02d}s" if minutes else f"{left}s"


class Progress:
    """Shows a tally. ``quiet`` shows nothing; warnings and results are not its business."""

    def __init__(self, tally: Tally, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.tally = tally
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bars: Bars | None = None
        self._last_line = 0.0
        self.said: list[str] = []

    def __enter__(self) -> Progress:
        if not self._quiet and self._stream.isatty():
            self._start_bars()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self) -> None:
        """Bring the display up to the tally."""
        if self._bars is not None:
            self._update_bars(self._bars)
        elif not self._quiet and self._is_due():
            self._last_line = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """One line that stays, above the bars; ``said`` keeps the first MOST_LINES of them."""
        if len(self.said) < MOST_LINES:
            self.said.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def line(self) -> str:
        tally = self.tally
        done = tally.committed + tally.failed_shards
        return (
            f"{time.strftime('%H:%M:%S')} shards {done}/{tally.shards} · "
            f"images {tally.finished_samples}/{tally.samples} · {tally.rate:.1f} images/s · "
            f"ETA {duration(tally.eta_s)} · rejected {tally.rejected} · failed {tally.failed}"
        )

    def _is_due(self) -> bool:
        done = self.tally.committed + self.tally.failed_shards >= self.tally.shards
        return done or time.monotonic() - self._last_line >= LOG_EVERY_S

    def _start_bars(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description:<7}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(file=self._stream),
        )
        self._bars.start()
        self._shards = self._bars.add_task("shards", total=self.tally.shards, note="")
        self._images = self._bars.add_task("images", total=self.tally.samples, note="starting")
        self._update_bars(self._bars)

    def _update_bars(self, bars: Bars) -> None:
        tally = self.tally
        dropped = f"rejected {tally.rejected} · failed {tally.failed}"
        bars.update(self._shards, completed=tally.committed + tally.failed_shards, note=dropped)
        note = f"{tally.rate:.1f}/s · ETA {duration(tally.eta_s)}" if tally.made else "starting"
        bars.update(self._images, completed=tally.finished_samples, note=note)
