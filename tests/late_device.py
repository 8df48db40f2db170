"""A device that works behind the host, as CUDA does, with arithmetic stages on it.

Three threads stand for its parts: the main stream, the stream beside it, and the copy engine. Each
works through what is queued on it, in order.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from batchgen.records import ConditionBatch, EncodedBatch, ImageBatch, LatentBatch
from batchgen.shard.device import Device
from batchgen.shard.stages import FusedStages
from batchgen.stages.queue import Later, Mark, Queue
from tests.arithmetic_stages import ArithmeticDecoder, ArithmeticDenoiser, ArithmeticEncoder


class LateMark:
    """The device has passed it once the last piece of work before it is done."""

    def __init__(self, last: Future[float] | None) -> None:
        self._last = last

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def at(self) -> float:
        assert self._last is None or self._last.done(), "the device has not passed this mark"
        return 0.0 if self._last is None else self._last.result()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, LateMark)
        return self.at() - earlier.at()


class LateQueue(Queue):
    """What was done, in the order in which the device did it, is in ``log``."""

    ahead = 1

    def __init__(self) -> None:
        self.log: list[str] = []
        self._streams = {name: ThreadPoolExecutor(1, name) for name in ("main", "side", "copy")}
        self._last: dict[str, Future[float] | None] = dict.fromkeys(self._streams)
        self._host = threading.local()

    @property
    def stream(self) -> str:
        """The stream on which the host's thread queues now."""
        return getattr(self._host, "stream", "main")

    def work(
        self,
        name: str,
        act: Callable[[], None],
        stream: str = "",
        after: Future[float] | None = None,
    ) -> Future[float]:
        """Queue a piece of work, which begins no sooner than ``after`` has ended."""

        def run() -> float:
            if after is not None:
                after.result()
            act()
            if name:
                self.log.append(name)
            return time.perf_counter()

        stream = stream or self.stream
        queued = self._streams[stream].submit(run)
        self._last[stream] = queued
        return queued

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._host.stream = "side"
        try:
            yield
        finally:
            self._host.stream = "main"

    def join(self, tensors: Iterable[object]) -> None:
        assert list(tensors)
        self.work("", lambda: None, "main", self._last["side"])

    def mark(self) -> Mark:
        return LateMark(self._last[self.stream])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.shutdown()


Act = Callable[[int], None]  # called on the device, with the number of the micro-batch


def nothing(number: int) -> None:
    pass


class LateEncoder(ArithmeticEncoder):
    """The host waits for it, as for the copy of a prompt's tokens, but for nothing before it."""

    def __init__(self, queue: LateQueue, act: Act = nothing) -> None:
        super().__init__()
        self.queue, self.act, self.number = queue, act, itertools.count()

    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        number = next(self.number)
        self.queue.work(f"encode {number}", lambda: self.act(number)).result()
        return super().__call__(batch)


class LateDenoiser(ArithmeticDenoiser):
    def __init__(self, queue: LateQueue, act: Act = nothing) -> None:
        super().__init__()
        self.queue, self.act, self.number = queue, act, itertools.count()

    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        number = next(self.number)
        self.queue.work(f"denoise {number}", lambda: self.act(number))
        return super().__call__(batch)


class LateDecoder(ArithmeticDecoder):
    """Before its copy has ended, the host sees what the memory held before."""

    def __init__(self, queue: LateQueue, act: Act = nothing, copy: Act = nothing) -> None:
        super().__init__()
        self.queue, self.act, self.copy, self.number = queue, act, copy, itertools.count()

    def start(self, batch: LatentBatch) -> Later[ImageBatch]:
        number = next(self.number)
        decoded = self(batch)
        host = ImageBatch(np.zeros_like(decoded.pixels), decoded.finite, decoded.truncated)

        def arrive() -> None:
            self.copy(number)
            host.pixels[:] = decoded.pixels

        made = self.queue.work(f"decode {number}", lambda: self.act(number))
        copied = self.queue.work(f"copy {number}", arrive, "copy", made)
        return Later(LateMark(copied), lambda: host)


def late_stages(
    queue: LateQueue,
    encode: Act = nothing,
    denoise: Act = nothing,
    decode: Act = nothing,
    copy: Act = nothing,
) -> FusedStages:
    """Stages of which each piece acts as given, on the device's threads."""
    stages: Any = FusedStages
    made: FusedStages = stages(
        LateEncoder(queue, encode), LateDenoiser(queue, denoise), LateDecoder(queue, decode, copy)
    )
    made.device = Device("cpu", queue)
    return made
