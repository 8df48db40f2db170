"""The values that travel with a shard through the stages: its samples, measurements and attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchgen.records import Dropped, Sample, ShardRows


@dataclass(frozen=True)
class Notes:
    """Measurements of a shard: seconds by stage, and parameter counts of the model parts."""

    timings_s: dict[str, float] = field(default_factory=dict)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)

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
    """A shard between stages: its rows, its samples and the measurements so far."""

    rows: ShardRows
    groups: tuple[tuple[Sample, ...], ...]  # by micro-batch
    dropped: tuple[Dropped, ...]
    notes: Notes


@dataclass(frozen=True)
class Trial:
    """How to make one attempt at a shard, as judged by the attempts before.

    Attributes:
        alone: keys of the samples that each get a micro-batch of their own.
        without: key -> error, for samples that are recorded as failed without being processed.
        working_on: called with the keys of the samples that are processed next.
        made: called with the number of samples that a micro-batch has just denoised.
        decode_batch_size: number of samples in each call of the VAE's decoder, if this replica has
            too little memory for the planned number; None: the planned number.
    """

    alone: Collection[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    working_on: Callable[[Iterable[str]], None] = lambda keys: None
    made: Callable[[int], None] = lambda samples: None
    decode_batch_size: int | None = None

    def on(self, samples: Iterable[Sample]) -> None:
        self.working_on(sample.key for sample in samples)
