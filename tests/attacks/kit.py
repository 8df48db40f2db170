"""The register of attacks, the result of a command, and a limit on heavy commands at a time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PY = sys.executable
Result = dict[str, tuple[Any, str]] | tuple[Any, Any]  # of each id: what came of it, what was seen
HELD, BROKEN, OTHER = "held", "broken", "n/a"
ATTACKS: dict[str, Attack] = {}


@dataclass
class Attack:
    id: str
    title: str
    fn: Callable[[Any], Any]
    ids: list[str]
    titles: dict[str, str]


def attack(id: str, title: str, many: dict[str, str] | None = None) -> Any:
    """Register an attack; with ``many`` one function returns {id: (verdict, seen)}."""

    def deco(fn: Any) -> Any:
        ids = list(many) if many else [id]
        ATTACKS[id] = Attack(id, title, fn, ids, many or {id: title})
        return fn

    return deco


class Slots(threading.local):
    """Whether this thread holds one of the slots for heavy work; an attack keeps it to its end."""

    count = threading.BoundedSemaphore(2)
    held = False


SLOTS = Slots()


def slots(jobs: int) -> None:
    Slots.count = threading.BoundedSemaphore(jobs)


@contextlib.contextmanager
def slot() -> Iterator[None]:
    """One of the slots for attacks that run the generator."""
    if not SLOTS.held:
        Slots.count.acquire()
        SLOTS.held = True
    yield


def free_slot() -> None:
    if SLOTS.held:
        SLOTS.held = False
        Slots.count.release()


@dataclass
class Out:
    rc: int
    out: str
    err: str
    secs: float
    timed_out: bool = False
    rss_mb: float = 0.0

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def tb(self) -> bool:
        return "Traceback (most recent call last)" in self.text

    @property
    def last(self) -> str:
        lines = [x for x in self.text.strip().splitlines() if x.strip()]
        return (lines[-1] if lines else "")[:220]

    def msg(self, n: int = 220) -> str:
        """The message line, or the last one."""
        for line in self.text.splitlines():
            if line.startswith("batchgen:"):
                return line[:n]
        return self.last[:n]


def ok_err(o: Out) -> bool:
    """A clean refusal: usage exit code, no traceback, a message."""
    return not o.timed_out and o.rc in (1, 2, 3, 4) and not o.tb and bool(o.text.strip())
