"""The right of one run to write an output: numbered leases in its ledger, kept by a heartbeat."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchgen.errors import BatchgenError, OutputBusy
from batchgen.storage import Store

LEASES = "_batchgen/lease"
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 5.0  # where a store cannot create a name only once
_NUMBERED = re.compile(r"^(\d+)\.json$")


@dataclass(frozen=True)
class Holder:
    """A run by its lease.

    Attributes:
        renewed_at: seconds since the epoch.
        at_work: it has neither given the lease back nor let it expire, nor is it known to be dead.
    """

    lease: int
    owner: str
    renewed_at: float
    at_work: bool


def holder_of(store: Store) -> Holder | None:
    """Who works on this output, or did last; None if nobody ever did."""
    return _holder(store, _highest_lease(store))


def _holder(store: Store, number: int) -> Holder | None:
    try:
        tree = json.loads(store.read(_lease_name(number)))
    except (FileNotFoundError, ValueError):
        return None
    left = tree["renewed_at"] + LEASE_SECONDS - time.time()
    at_work = not tree["released"] and left > 0 and not _is_dead_neighbour(tree["owner"])
    return Holder(number, tree["owner"], tree["renewed_at"], at_work)


@dataclass
class Lease:
    """The right of one run to write an output, kept alive by a heartbeat.

    Leases are numbered and each is created only if its number is free, so of any number of runs
    that reach for the next one exactly one gets it; the highest number holds. The old ones stay as
    a history of runs.
    """

    store: Store
    number: int
    owner: str
    lost: threading.Event = field(default_factory=threading.Event)
    _end: threading.Event = field(default_factory=threading.Event)

    def beat(self, released: bool = False) -> None:
        """Renew it once: the heartbeat is its own next try."""
        self.store.impatient().put(_lease_name(self.number), _lease_text(self.owner, released))

    def still_held(self) -> bool:
        return _highest_lease(self.store.impatient()) == self.number

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
def hold_lease(store: Store, on_lost: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the output's lease while the block runs.

    Raises:
        OutputBusy: another run holds it; names the holder and how long to wait.
    """
    lease = acquire_lease(store)
    thread = threading.Thread(target=lease.keep, args=(on_lost,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.release(thread)


def acquire_lease(store: Store) -> Lease:
    """Take the next lease if the last one is released, expired or its process is gone."""
    highest = _highest_lease(store)
    _refuse_if_held(store, highest)
    alone = store.creates_alone()
    lease = Lease(store, highest + 1, f"{_process_identity()} {uuid.uuid4().hex[:8]}")
    created = store.put_new(_lease_name(lease.number), _lease_text(lease.owner, released=False))
    if not alone:  # the name may have been taken twice: the last to write it has it
        time.sleep(SETTLE_SECONDS)
        created = created and _lease_owner(store, lease.number) == lease.owner
    if not created or _highest_lease(store) != lease.number:
        _refuse_if_held(store, _highest_lease(store))
        raise OutputBusy(f"output {store.url}: another run took its lease at the same moment")
    return lease


def _refuse_if_held(store: Store, number: int) -> None:
    holder = _holder(store, number)
    if holder is None or not holder.at_work:
        return
    left = holder.renewed_at + LEASE_SECONDS - time.time()
    raise OutputBusy(
        f"output {store.url} is held by another run ({holder.owner}); wait for it to end, or if "
        f"that run is dead try again in {left:.0f} s"
    )


def _lease_owner(store: Store, number: int) -> str:
    try:
        return str(json.loads(store.read(_lease_name(number)))["owner"])
    except (FileNotFoundError, ValueError):
        return ""


def _highest_lease(store: Store) -> int:
    matches = (_NUMBERED.match(name) for name in store.list(LEASES))
    return max((int(match.group(1)) for match in matches if match), default=0)


def _lease_name(number: int) -> str:
    return f"{LEASES}/{number:05d}.json"


def _lease_text(owner: str, released: bool) -> bytes:
    return json.dumps({"owner": owner, "renewed_at": time.time(), "released": released}).encode()


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
    """Start of a process in clock ticks since boot; ``gone`` when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[19]
    except OSError:
        return "gone"
