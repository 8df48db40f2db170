"""The values that travel with a shard through the stages: its samples, measurements and attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen.records import Dropped, Sample, ShardRows
from batchgen.stages.queue import Mark

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Notes:
    """Measurements of a shard: seconds by stage, and parameter counts of the model parts."""

    timings_s: dict[str, float] = field(default_factory=dict)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    _between: list[tuple[str, Mark, Mark]] = field(default_factory=list, init=False)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(stage, time.perf_counter() - start)

    def between(self, stage: str, start: Mark, end: Mark) -> None:
        """Count the device's time between two marks, which it may not have passed yet."""
        self._between.append((stage, start, end))

    def settle(self) -> None:
        """Add up the times between marks; the device has passed them all."""
        while self._between:
            stage, start, end = self._between.pop()
            self._add(stage, end.seconds_since(start))

    def facts(self) -> dict[str, object]:
        """The measurements by name, from which ``Notes(**facts)`` is made again."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def _add(self, stage: str, seconds: float) -> None:
        self.timings_s[stage] = round(self.timings_s.get(stage, 0.0) + seconds, 6)


@dataclass(frozen=True)
class ShardWork:
    """A shard between stages: its rows, its samples and the measurements so far.

    ``labels``: see ``Prepared.labels``. ``sources``: row -> its conditioning image as the model
    got it, uint8 RGB (height, width, 3); empty if no scorer compares with them.
    """

    rows: ShardRows
    groups: tuple[tuple[Sample, ...], ...]  # by micro-batch
    dropped: tuple[Dropped, ...]
    notes: Notes
    labels: pa.Table | None = None
    sources: Mapping[int, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """How to make one attempt at a shard, as judged by the attempts before.

    Attributes:
        alone: keys of the samples that each get a micro-batch of their own.
        without: key -> error, for samples that are recorded as failed without being processed.
        working_on: called with the keys of the samples that are processed next.
        made: called with the number of samples of a micro-batch that the device has finished.
        careful: the device finishes each micro-batch before it is given the next one.
        decode_batch_size: number of samples in each call of the VAE's decoder, if this replica has
            too little memory for the planned number; None: the planned number.
    """

    alone: Collection[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    working_on: Callable[[Iterable[str]], None] = lambda keys: None
    made: Callable[[int], None] = lambda samples: None
    careful: bool = False
    decode_batch_size: int | None = None

    def on(self, samples: Iterable[Sample]) -> None:
        self.working_on(sample.key for sample in samples)
