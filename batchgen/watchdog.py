"""Calls a function at intervals, in a thread of its own, while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(
    name: str,
    look: Callable[[], object],
    every_s: float,
    wait_s: float | None = None,
    at_end: bool = False,
) -> Iterator[None]:
    """Inside, ``look`` is called every ``every_s`` seconds, until it returns something true.

    Args:
        name: of the thread.
        look: must not raise.
        every_s: the first call comes after this time as well.
        wait_s: at the end a call that is under way is waited for, but no longer than this: one that
            waits inside Ray for a head that is gone does not return for minutes.
        at_end: it is called once more when the block ends.
    """
    over = threading.Event()

    def run() -> None:
        is_over = False
        while not is_over:
            is_over = over.wait(every_s)
            if (at_end or not is_over) and look():
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(wait_s)
