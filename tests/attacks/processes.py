"""Finds and ends the processes that attacks have started, with their descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kill_group(p: subprocess.Popen) -> None:
    """End a process that this harness started, and what it has started, by ids."""
    pids = descendants(p.pid)
    with contextlib.suppress(OSError):
        os.killpg(p.pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(Exception):
        p.wait(10)


def descendants(pid: int) -> list[int]:
    kids: dict[int, list[int]] = {}
    for d in os.listdir("/proc"):
        if d.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parts = Path(f"/proc/{d}/stat").read_text().rpartition(")")[2].split()
                kids.setdefault(int(parts[1]), []).append(int(d))
    found, todo = [], [pid]
    while todo:
        for k in kids.get(todo.pop(), []):
            found.append(k)
            todo.append(k)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(
    fn: Callable[[], Any], seconds: float, p: subprocess.Popen | None = None, pause: float = 0.1
) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        v = fn()
        if v:
            return v
        if p is not None and p.poll() is not None:
            return fn()
        time.sleep(pause)
    return None
