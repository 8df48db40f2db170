"""Displays a run's progress: bars on a terminal, otherwise a log line at intervals."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from batchgen.output.tally import Tally, duration, figure
from batchgen.plain_text import plain

if TYPE_CHECKING:
    from batchgen.attempts import News
    from batchgen.progress.bars import Bars

__all__ = ["Progress", "Tally", "duration"]

LOG_EVERY_S = 10.0
MOST_LINES = 2000


class Progress:
    """Displays a tally; with ``quiet`` it displays nothing. Any thread may call it.

    Warnings and results are printed elsewhere.
    """

    def __init__(self, tally: Tally, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.tally = tally
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bars: Bars | None = None
        self._last_line = 0.0
        self._complete = False  # whether the final line was shown
        self._phase = "starting"
        self._turn = threading.RLock()
        self.said: list[str] = []
        self.doing = "generating"

    def __enter__(self) -> Progress:
        if not self._quiet and self._stream.isatty():
            from batchgen.progress.bars import Bars

            self._bars = Bars(self._stream, self.tally.shards, self.tally.samples)
            self._update_bars(self._bars)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self) -> None:
        """Update the display from the tally."""
        with self._turn:
            if self._bars is not None:
                self._update_bars(self._bars)
            elif not self._quiet and self._is_due():
                self._last_line = time.monotonic()
                print(self.line(), file=self._stream, flush=True)

    def end(self) -> None:
        """Stop the clock, and say how many images were made and how fast."""
        self.tally.end()
        self.say(self.tally.summary)
        self.show()

    def say(self, text: str) -> None:
        """Print one permanent line, above the bars; ``said`` keeps the first MOST_LINES lines."""
        text = plain(text)
        with self._turn:
            self._keep(text)
            if self._quiet:
                return
            if self._bars is not None:
                self._bars.console.print(text, highlight=False, markup=False)
            else:
                print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def enter_phase(self, text: str) -> None:
        """Display what the run does from now on, as a line or as the note next to the bars."""
        with self._turn:
            self.tally.go_on()
            self._phase = plain(text)
            if self._bars is None:
                self.say(text)
            else:
                self._keep(self._phase)
                self._update_bars(self._bars)

    def hear(self, news: News) -> None:
        """Display news of the workers: lines for the user, and samples of unfinished shards."""
        for words in news.said:
            self.say(words)
        starting = self.tally.began is None
        self.tally.hear(news.under_way, news.began_before_s)
        if starting and self.tally.start_up_s is not None:
            self.enter_phase(f"{self.doing}, after {duration(self.tally.start_up_s)} of start-up")
        self.show()

    def line(self) -> str:
        tally = self.tally
        return (
            f"{time.strftime('%H:%M:%S')} shards {self._done:,}/{tally.shards:,} · "
            f"images {tally.made_so_far:,}/{tally.samples:,} · {self._pace(' images/s')} · "
            f"rejected {tally.rejected:,} · failed {tally.failed:,}"
        )

    @property
    def _done(self) -> int:
        return self.tally.committed + self.tally.failed_shards

    def _pace(self, unit: str) -> str:
        """The rate and the time left; before any image is generated, the run's phase."""
        tally = self.tally
        if tally.ended is not None or self._done >= tally.shards:
            return f"{figure(tally.overall_rate)}{unit} · {duration(tally.seconds)} in all"
        if tally.eta_s is None:
            return self._phase
        return f"{figure(tally.rate)}{unit} · ETA {duration(tally.eta_s)}"

    def _keep(self, text: str) -> None:
        if len(self.said) < MOST_LINES:
            self.said.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _is_due(self) -> bool:
        if self._done >= self.tally.shards:
            first, self._complete = not self._complete, True
            return first
        return time.monotonic() - self._last_line >= LOG_EVERY_S

    def _update_bars(self, bars: Bars) -> None:
        tally = self.tally
        dropped = f"rejected {tally.rejected:,} · failed {tally.failed:,}"
        bars.show_shards(self._done, dropped, tally.above_limits)
        bars.show_images(tally.made_so_far, self._pace("/s"), tally.above_limits)
