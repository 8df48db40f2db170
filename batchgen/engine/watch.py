"""Watchdog of a replica: ends its process if it makes no progress, so that Ray restarts it."""

from __future__ import annotations

import faulthandler
import threading
import time

REARM_S = 1.0


class Watch:
    """Ends this process if, inside the watch, no progress is reported for ``limit_s`` seconds.

    A C thread (``faulthandler``) keeps the deadline. It needs no interpreter lock, so it also ends
    a process that hangs in native code. It writes the stacks to the worker's stderr.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._inside = 0
        self._armed_at = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self._arm()

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                self._arm()
            elif self._limit_s is not None:
                faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Restart the countdown, for all threads inside the watch."""
        with self._lock:
            if self._inside and time.monotonic() - self._armed_at >= REARM_S:
                self._arm()

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        if self._limit_s is not None:
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=2)
