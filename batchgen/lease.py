"""The right of a run to write an output or a part of it: numbered leases, kept by a heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchgen.errors import BatchgenError, OutputBusy
from batchgen.storage import Store

LEASES = "_batchgen/lease"
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 5.0  # where a store cannot create a name only once
_THREADS = 8
_TRIES = 20
_NUMBERED = re.compile(r"^(\d+)\.json$")


Part = tuple[int, int]  # shards from, and up to but not with


@dataclass(frozen=True)
class Holder:
    """A run by its lease.

    Attributes:
        part: the shards that it holds; None for all of them.
        renewed_at: seconds since the epoch.
        at_work: it has neither given the lease back nor let it expire, nor is it known to be dead.
    """

    lease: int
    owner: str
    part: Part | None
    renewed_at: float
    at_work: bool

    def meets(self, part: Part | None) -> bool:
        """The two have shards in common."""
        if self.part is None or part is None:
            return True
        return self.part[0] < part[1] and part[0] < self.part[1]

    def __str__(self) -> str:
        return self.owner if self.part is None else f"{self.owner}, shards {part_text(self.part)}"


def part_text(part: Part) -> str:
    return f"{part[0]}:{part[1]}"


def holders_of(store: Store) -> list[Holder]:
    """Every run into this output, by its lease, in the order in which they began."""
    return _holders(store, _leases(store))


def _holders(store: Store, numbers: list[int]) -> list[Holder]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda number: _holder(store, number), numbers)
        return [holder for holder in found if holder is not None]


def _holder(store: Store, number: int) -> Holder | None:
    try:
        tree = json.loads(store.read(_lease_name(number)))
    except (FileNotFoundError, ValueError):
        return None
    left = tree["renewed_at"] + LEASE_SECONDS - time.time()
    at_work = not tree["released"] and left > 0 and not _is_dead_neighbour(tree["owner"])
    part = tuple(tree["shards"]) if tree.get("shards") else None
    return Holder(number, tree["owner"], part, tree["renewed_at"], at_work)


@dataclass
class Lease:
    """The right of one run to write an output, or a part of it, kept alive by a heartbeat.

    Leases are numbered and each is created only if its number is free, so that of any number of
    runs that reach for the next one exactly one gets it. A run that takes one has seen all of lower
    number, so of two that have shards in common the higher holds. The old ones stay as a history of
    runs.
    """

    store: Store
    number: int
    owner: str
    part: Part | None = None
    lost: threading.Event = field(default_factory=threading.Event)
    _end: threading.Event = field(default_factory=threading.Event)
    _strangers: set[int] = field(default_factory=set)  # later leases, of other parts

    def text(self, released: bool = False) -> bytes:
        facts = {"owner": self.owner, "renewed_at": time.time(), "released": released}
        return json.dumps(facts | ({"shards": self.part} if self.part else {})).encode()

    def beat(self, released: bool = False) -> None:
        """Renew it once: the heartbeat is its own next try."""
        self.store.impatient().put(_lease_name(self.number), self.text(released))

    def still_held(self) -> bool:
        """No run has taken a later lease with shards of this one."""
        store = self.store.impatient()
        for number in _leases(store):
            if number <= self.number or number in self._strangers:
                continue
            later = _holder(store, number)
            if later is None or later.meets(self.part):
                return False
            self._strangers.add(number)
        return True

    def keep(self, on_lost: Callable[[str], None]) -> None:
        """Renew until released; call ``on_lost`` once if another run has taken over."""
        failures_since = time.time()
        while not self._end.wait(HEARTBEAT_SECONDS):
            try:
                if not self.still_held():
                    self.lost.set()
                    on_lost("another run has taken over this output's lease")
                    return
                self.beat()
                failures_since = time.time()
            except Exception as error:  # whatever it is, the lease is not renewed
                if time.time() - failures_since > LEASE_SECONDS:
                    self.lost.set()
                    on_lost(f"the lease could not be renewed for {LEASE_SECONDS:.0f} s: {error}")
                    return

    def release(self, heartbeat: threading.Thread | None = None) -> None:
        """Give the lease back; the heartbeat ends first, so that it cannot take it again."""
        self._end.set()
        if heartbeat is not None:
            heartbeat.join(timeout=LEASE_SECONDS)
        if not self.lost.is_set():
            with contextlib.suppress(BatchgenError, OSError):
                self.beat(released=True)


@contextmanager
def hold_lease(
    store: Store, on_lost: Callable[[str], None], part: Part | None = None
) -> Iterator[Lease]:
    """Hold the output's lease, or that of a part of its shards, while the block runs.

    Raises:
        OutputBusy: another run holds it; names the holder and how long to wait.
    """
    lease = acquire_lease(store, part)
    thread = threading.Thread(target=lease.keep, args=(on_lost,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.release(thread)


def acquire_lease(store: Store, part: Part | None = None) -> Lease:
    """Take the next lease, if no run at work has shards in common with it."""
    owner = f"{_process_identity()} {uuid.uuid4().hex[:8]}"
    for _ in range(_TRIES):
        numbers = _leases(store)
        for holder in _holders(store, numbers):
            if holder.at_work and holder.meets(part):
                raise OutputBusy(_busy(store, holder))
        lease = Lease(store, max(numbers, default=0) + 1, owner, part)
        alone = store.creates_alone()
        created = store.put_new(_lease_name(lease.number), lease.text())
        if not alone:  # the name may have been taken twice: the last to write it has it
            time.sleep(SETTLE_SECONDS)
            taker = _holder(store, lease.number)
            created = created and taker is not None and taker.owner == owner
        if created:
            return lease
    raise OutputBusy(f"output {store.url}: other runs take its leases at the same moment")


def _busy(store: Store, holder: Holder) -> str:
    left = holder.renewed_at + LEASE_SECONDS - time.time()
    return (
        f"output {store.url} is held by another run ({holder}); wait for it to end, or if that run "
        f"is dead try again in {left:.0f} s"
    )


def _leases(store: Store) -> list[int]:
    matches = (_NUMBERED.match(name) for name in store.list(LEASES))
    return sorted(int(match.group(1)) for match in matches if match)


def _lease_name(number: int) -> str:
    return f"{LEASES}/{number:05d}.json"


def _process_identity() -> str:
    """``host pid place start``; see ``_process_place`` and ``_process_start``."""
    pid = os.getpid()
    return f"{socket.gethostname()} {pid} {_process_place()} {_process_start(pid)}"


def _is_dead_neighbour(owner: str) -> bool:
    """The owner ran where this process runs, so that its pid can be looked up, and is no more."""
    host, pid, place, start, *_ = [*owner.split(" "), "", "", ""]
    if (host, place) != (socket.gethostname(), _process_place()) or place == "unknown":
        return False
    return pid.isdigit() and _process_start(int(pid)) != start


def _process_place() -> str:
    """This boot of this machine and the pid namespace: within them a pid means one process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()[:8]}-{os.readlink('/proc/self/ns/pid')[5:-1]}"
    except OSError:
        return "unknown"


def _process_start(pid: int) -> str:
    """Start of a process in clock ticks since boot; ``gone`` when it has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if fields[0] in ("Z", "X") else fields[19]
