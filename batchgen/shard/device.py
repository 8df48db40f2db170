"""A stage's device: one shard at a time queues work on it, while it still finishes the last."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from batchgen.errors import OutOfMemory
from batchgen.records import Sample
from batchgen.shard.work import Notes, Trial
from batchgen.stages.out_of_memory import is_out_of_memory
from batchgen.stages.queue import Mark, Queue, queue_of

In = TypeVar("In")
Out = TypeVar("Out")


class Device:
    """The device of a stage's model, and the lock under which one shard at a time gives it work.

    Args:
        name: torch's name of the device: ``cpu``, ``cuda:0``.
        queue: how it takes work; by default that of a device with this name.
    """

    def __init__(self, name: str = "cpu", queue: Queue | None = None) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.queue = queue or queue_of(name)

    @contextmanager
    def held(self, notes: Notes) -> Iterator[None]:
        """Inside, only this shard queues work; the time waited for that is recorded."""
        with notes.timed("wait"):
            self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()

    def run(self, stage: Callable[[In], Out], batch: In, name: str, notes: Notes) -> Out:
        """Run one stage on one micro-batch; the device's clock tells how long it takes.

        Raises:
            OutOfMemory: memory is lacking; the library's error is its cause.
        """
        start = self.queue.mark()
        try:
            made = stage(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(name, f"{type(error).__name__}: {error}") from error
            raise
        notes.between(name, start, self.queue.mark())  # after an error a mark could hide it
        return made


class Flight:
    """The micro-batches of a shard that its device was given and has not finished.

    The host is at most ``queue.ahead`` micro-batches ahead. In a careful trial it waits for each
    one, so that an error of the device is charged to the samples that caused it.
    """

    def __init__(self, queue: Queue, trial: Trial) -> None:
        self._ahead = 0 if trial.careful else queue.ahead
        self._trial = trial
        self._given: deque[tuple[Sequence[Sample], Mark]] = deque()

    def begin(self, samples: Sequence[Sample]) -> None:
        """The device is given these samples next."""
        under_way = [one for group, _ in self._given for one in group]
        self._trial.on([*under_way, *samples])

    def given(self, samples: Sequence[Sample], mark: Mark) -> None:
        """All work on these samples is queued; waits until few enough are unfinished."""
        self._given.append((samples, mark))
        self._wait(self._ahead)

    def end(self) -> None:
        """Wait until the device has finished all."""
        self._wait(0)
        self._trial.on(())

    def _wait(self, unfinished: int) -> None:
        while len(self._given) > unfinished:
            samples, mark = self._given[0]
            mark.wait()
            self._given.popleft()
            self._trial.made(len(samples))
