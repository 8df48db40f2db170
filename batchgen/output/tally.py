"""Counts samples and shards by outcome, and how fast this run generates them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchgen.spec.splits import OTHER_SPLIT

if TYPE_CHECKING:
    from batchgen.output.marker import Example


@dataclass
class Tally:
    """Counts of samples and shards by outcome, and the rates of this run.

    Attributes:
        failed_limit, rejected_limit: fractions of the finished samples that the policy allows.
        rejected_again, failed_again: those of the rejected and failed samples that were made again,
            so that another sample counts in their place.
        truncated: accepted samples whose prompt was too long for the text encoder.
        flawed_shards: committed shards with failed samples in them.
        reasons: reason -> number of samples rejected or failed for it.
        examples: reason -> one of these samples, if a marker names one.
        made, accepted_now, rejected_now: samples that this run finished.
        failing_now, rejecting_now: shards of this run with failed or rejected samples.
        since: when the run began, by the monotonic clock.
        began: when work on its first shard began; None before that.
        ended: when its last shard ended.
        under_way: shard -> number of its samples that are generated but not yet committed. Only
            the display counts them: if a worker is lost, its samples are generated again.
    """

    shards: int
    samples: int
    failed_limit: float = 1.0
    rejected_limit: float = 1.0
    committed: int = 0
    failed_shards: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    rejected_again: int = 0
    failed_again: int = 0
    truncated: int = 0
    flawed_shards: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    made: int = 0
    accepted_now: int = 0
    rejected_now: int = 0
    failing_now: int = 0
    rejecting_now: int = 0
    since: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    under_way: Mapping[int, int] = field(default_factory=dict)
    _over: set[int] = field(default_factory=set)  # shards that this run has finished

    @property
    def finished_samples(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def made_so_far(self) -> int:
        """Samples that are finished or generated but not yet committed; for the display."""
        return min(self.samples, self.finished_samples + self._drawn)

    @property
    def refused(self) -> int:
        """Rejected samples that count: not those of other splits, nor those made again."""
        return self.rejected - self.rejected_again - self.reasons[OTHER_SPLIT]

    @property
    def above_limits(self) -> bool:
        """Whether more of the finished samples failed or were rejected than the policy allows."""
        finished = self.finished_samples
        return (
            self.failed > self.failed_limit * finished
            or self.refused > self.rejected_limit * finished
        )

    def note(self, reasons: Mapping[str, int], examples: Mapping[str, Example]) -> None:
        """Count dropped samples by reason; the first example of each reason is kept."""
        self.reasons.update(reasons)
        self.examples = {**examples, **self.examples}

    def hear(self, under_way: Mapping[int, int], began_before_s: float | None) -> None:
        """Take the workers' news: uncommitted samples, and seconds since the first shard began."""
        self.under_way = under_way
        if self.began is None and began_before_s is not None:
            self.began = max(self.since, time.monotonic() - began_before_s)

    def end_shard(self, shard: int) -> None:
        """This run has finished the shard: its samples no longer count as under way."""
        self._over.add(shard)

    def go_on(self) -> None:
        """The run generates more: let the clock run, if a part of the run had ended."""
        self.ended = None

    def end(self) -> None:
        """The run generates nothing more: stop the clock, so that its rates no longer change."""
        self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the run began, until it ended."""
        return max(1e-9, self._now - self.since)

    @property
    def start_up_s(self) -> float | None:
        """Seconds from the run's start until work on its first shard began; None before that."""
        return None if self.began is None else self.began - self.since

    @property
    def summary(self) -> str:
        """This run's images and rates: ``500 images in 53s (9.4/s; 21.3/s after 31s of
        start-up)``."""
        images = f"{self.accepted_now:,} image{'' if self.accepted_now == 1 else 's'}"
        rates = f"{figure(self.overall_rate)}/s"
        if self.start_up_s is not None:
            rates += f"; {figure(self.rate)}/s after {duration(self.start_up_s)} of start-up"
        return f"{images} in {duration(self.seconds)} ({rates})"

    @property
    def overall_rate(self) -> float:
        """Accepted images per second since the run began, including start-up."""
        return self.accepted_now / self.seconds

    @property
    def rate(self) -> float:
        """Images per second since work on the first shard began."""
        return (self.accepted_now + self._drawn) / self._working_s

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the rate so far; None until the first micro-batch is generated."""
        if self.finished_samples >= self.samples:
            return 0.0
        done = self.made + self._drawn
        return (self.samples - self.made_so_far) * self._working_s / done if done else None

    @property
    def _now(self) -> float:
        return time.monotonic() if self.ended is None else self.ended

    @property
    def _working_s(self) -> float:
        return max(1e-9, self._now - (self.since if self.began is None else self.began))

    @property
    def _drawn(self) -> int:
        return sum(made for shard, made in self.under_way.items() if shard not in self._over)


def duration(seconds: float | None) -> str:
    """``1h02m``, ``3m05s``, ``12s``; ``-`` for None."""
    if seconds is None:
        return "-"
    minutes, left = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{left:02d}s" if minutes else f"{left}s"


def figure(number: float) -> str:
    """A rate as it is displayed: ``9.4``, ``1,234``."""
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"
