"""Ctrl-C, SIGTERM and a run's own watchdogs end it as one exception, ``Interrupted``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from batchgen.errors import Interrupted


@contextmanager
def interruptible() -> Iterator[Callable[[str], None]]:
    """Inside, Ctrl-C, SIGTERM and the yielded function end the run as ``Interrupted``.

    The function does so once: several watchdogs may call it, and the second signal would find a run
    that is ending, or a process without a handler, which it would kill without a word.
    """
    why: list[str] = []
    over = threading.Event()
    turn = threading.Lock()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt  # an Exception would be caught, and logged, inside Ray

    def interrupt(reason: str) -> None:
        with turn:
            if why or over.is_set():
                return
            why.append(reason)
            if not previous:
                return  # the caller owns the signals, and the stream looks at the lease
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # while Ray ends, SIGTERM has no handler

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
    except ValueError:
        pass  # not in the main thread: the caller owns the signals
    try:
        yield interrupt
    except KeyboardInterrupt as error:
        raise Interrupted(*(why or ["interrupted"])) from error
    finally:
        over.set()
        with turn:
            for number, handler in previous.items():
                signal.signal(number, handler)
