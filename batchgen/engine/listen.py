"""Hears from the workers, meanwhile, what the driver shows of work that is not committed yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from batchgen.attempts import News
from batchgen.engine.shared import SharedAttempts
from batchgen.watchdog import watchdog

HEAR_EVERY_S = 0.5
LAST_WORD_S = 2.0  # without a head the thread waits inside Ray, and the driver not for it


@contextmanager
def listening(
    attempts: SharedAttempts, hear: Callable[[News], None] | None
) -> Iterator[Callable[[int], None]]:
    """Inside, ``hear`` is told at intervals, in a thread, and once more at the end.

    Yields a function that is to be called with the number of each shard that ends.
    """
    if hear is None:
        yield lambda shard: None
        return
    ended = list[int]()

    def listen() -> None:
        told = len(ended)
        try:
            news = attempts.news(ended[:told])
        except (ray.exceptions.RayError, RuntimeError, OSError):
            return  # the stream itself tells of a Ray that is gone
        del ended[:told]
        hear(news)

    with watchdog("listen", listen, HEAR_EVERY_S, wait_s=LAST_WORD_S, at_end=True):
        yield ended.append
