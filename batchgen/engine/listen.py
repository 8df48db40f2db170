"""Fetches news from the workers during the run: messages, and progress of uncommitted shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from batchgen.attempts import News
from batchgen.engine.shared import SharedAttempts
from batchgen.watchdog import watchdog

HEAR_EVERY_S = 0.5
LAST_WORD_S = 2.0  # without a head the thread waits inside Ray; the driver does not wait for it


@contextmanager
def listening(
    attempts: SharedAttempts, hear: Callable[[News], None] | None
) -> Iterator[Callable[[int], None]]:
    """Inside, a thread calls ``hear`` with news at intervals, and once more at the end.

    Yields a function; call it with the number of each shard that ends.
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
            return  # if Ray is lost, the stream itself reports it
        del ended[:told]
        hear(news)

    with watchdog("listen", listen, HEAR_EVERY_S, wait_s=LAST_WORD_S, at_end=True):
        yield ended.append
