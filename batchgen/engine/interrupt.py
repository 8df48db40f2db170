"""Turns Ctrl-C, SIGTERM and the calls of a run's watchdogs into one exception, ``Interrupted``."""

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
    """Inside, Ctrl-C, SIGTERM and the yielded function raise ``Interrupted`` in the main thread.

    The function acts on its first call only. Several watchdogs may call it, and a second signal
    would hit a run that is already ending, or a process without a handler, which it would kill
    without a message.
    """
    why: list[str] = []
    over = threading.Event()
    turn = threading.Lock()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt  # Ray catches and logs an Exception

    def interrupt(reason: str) -> None:
        with turn:
            if why or over.is_set():
                return
            why.append(reason)
            if not previous:
                return  # the caller handles signals; the stream ends when it checks the lease
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # SIGTERM has no handler while Ray shuts down

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
    except ValueError:
        pass  # only the main thread may set handlers: here the caller handles signals
    try:
        yield interrupt
    except KeyboardInterrupt as error:
        raise Interrupted(*(why or ["interrupted"])) from error
    finally:
        over.set()
        with turn:
            for number, handler in previous.items():
                signal.signal(number, handler)
