"""Counts of samples and shards by outcome, and how fast this run makes them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchgen.output.ledger import Example


@dataclass
class Tally:
    """Samples and shards by outcome, and how fast this run makes them.

    Attributes:
        failed_limit, rejected_limit: shares of the finished samples that the policy allows.
        truncated: accepted samples whose prompt was longer than the text encoder reads.
        flawed_shards: committed, with failed samples in them.
        reasons: reason -> samples rejected or failed for it.
        examples: reason -> one of them, where its marker names one.
        made, accepted_now, rejected_now: samples that this run finished.
        failing_now, rejecting_now: shards of this run that have such samples.
        since: when the run began, by the monotonic clock.
        began: when its first shard began to be made; None while it starts.
        ended: when the last one was finished.
        under_way: shard -> samples made of it that are not yet committed. They count for the
            display alone: what is lost with a worker is made again.
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
        """Samples finished or, for the display, under way."""
        return min(self.samples, self.finished_samples + self._drawn)

    @property
    def above_limits(self) -> bool:
        """More of the finished samples were dropped than the policy allows."""
        finished = self.finished_samples
        return (
            self.failed > self.failed_limit * finished
            or self.rejected > self.rejected_limit * finished
        )

    def note(self, reasons: Mapping[str, int], examples: Mapping[str, Example]) -> None:
        """Count samples that were dropped, by reason; the first example of each is kept."""
        self.reasons.update(reasons)
        self.examples = {**examples, **self.examples}

    def hear(self, under_way: Mapping[int, int], began_before_s: float | None) -> None:
        """What workers tell of uncommitted work, and how long ago the first of them began."""
        self.under_way = under_way
        if self.began is None and began_before_s is not None:
            self.began = max(self.since, time.monotonic() - began_before_s)

    def end_shard(self, shard: int) -> None:
        """This run has finished the shard: what was told of it before counts no more."""
        self._over.add(shard)

    def end(self) -> None:
        """The run makes nothing more; its rates stay as they are."""
        self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return max(1e-9, self._now - self.since)

    @property
    def start_up_s(self) -> float | None:
        """Seconds before the first shard began to be made; None while that has not happened."""
        return None if self.began is None else self.began - self.since

    @property
    def summary(self) -> str:
        """``500 images in 53s (9.4/s; 21.3/s after 31s of start-up)``: of this run."""
        images = f"{self.accepted_now:,} image{'' if self.accepted_now == 1 else 's'}"
        rates = f"{figure(self.overall_rate)}/s"
        if self.start_up_s is not None:
            rates += f"; {figure(self.rate)}/s after {duration(self.start_up_s)} of start-up"
        return f"{images} in {duration(self.seconds)} ({rates})"

    @property
    def overall_rate(self) -> float:
        """Accepted images a second since the run began, start-up included."""
        return self.accepted_now / self.seconds

    @property
    def rate(self) -> float:
        """Images a second since the first shard began to be made."""
        return (self.accepted_now + self._drawn) / self._working_s

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the pace so far; None until a first micro-batch is made."""
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
    """``9.4``, ``1,234``: a rate as it is shown."""
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"
