"""Calls a function at intervals, in a separate thread, while a block runs."""

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
    """Inside, ``look`` is called every ``every_s`` seconds, until it returns a true value.

    Args:
        name: name of the thread.
        look: the function; it must not raise.
        every_s: seconds between calls, and before the first one.
        wait_s: at the end, the longest time to wait for a call that is still running: a call that
            waits inside Ray for a lost head does not return for minutes. None waits without limit.
        at_end: call ``look`` once more when the block ends.
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
