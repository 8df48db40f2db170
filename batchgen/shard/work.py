"""A shard on its way through the stages: its work, what was noted of it, and the attempt at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchgen.records import Dropped, Sample, ShardRows


@dataclass(frozen=True)
class Notes:
    """What is noted about a shard on its way: seconds by stage, and the parts held."""

    timings_s: dict[str, float] = field(default_factory=dict)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.timings_s[stage] = round(self.timings_s.get(stage, 0.0) + elapsed, 6)


@dataclass(frozen=True)
class ShardWork:
    """A shard between stages: its rows, what its samples are, and what was noted so far."""

    rows: ShardRows
    groups: tuple[tuple[Sample, ...], ...]  # by micro-batch
    dropped: tuple[Dropped, ...]
    notes: Notes


@dataclass(frozen=True)
class Trial:
    """One attempt at a shard, in the light of those before.

    Attributes:
        alone: keys of samples that are worked on each in a micro-batch of its own.
        without: key -> why, for samples that are not worked on, but noted as failed.
        working_on: is told the keys of the samples that are worked on next.
        made: is told how many samples a micro-batch has brought past the denoiser.
    """

    alone: Collection[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    working_on: Callable[[Iterable[str]], None] = lambda keys: None
    made: Callable[[int], None] = lambda samples: None

    def on(self, samples: Iterable[Sample]) -> None:
        self.working_on(sample.key for sample in samples)
