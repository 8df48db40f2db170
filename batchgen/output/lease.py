"""The right of a run to write an output or a part of it: numbered leases, kept by a heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from batchgen.errors import BatchgenError, DamagedRecord, OutputBusy
from batchgen.output.shard_range import ShardRange, range_text
from batchgen.plain_text import short
from batchgen.secrets import redact
from batchgen.storage import Store
from batchgen.storage.documents import Count, Time, Version, read_document

LEASES = "_batchgen/lease"
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 5.0  # where a store cannot create a name only once
_THREADS = 8
_TRIES = 20
LEASE_VERSION = 1
WATCH_SECONDS = 2.5 * HEARTBEAT_SECONDS
TAKEN = "another run has taken over this output's lease"
_GONE = "output {} was deleted or moved while the run was at work; where it is now, `resume` it"


@dataclass(frozen=True)
class _Saved:
    """A lease as it lies in storage."""

    owner: str
    renewed_at: Time
    released: bool = False
    shards: tuple[Count, Count] | None = None
    started_at: Time | None = None
    ending: str = ""
    version: Version = LEASE_VERSION


@dataclass(frozen=True)
class Holder:
    """A run by its lease.

    Attributes:
        part: the shards that it holds; None for all of them.
        renewed_at: seconds since the epoch, by its machine's clock.
        released: it has given the lease back.
        started_at: None in leases of older versions.
        ending: how it ended, in words; empty while it is at work, or if nobody could write it.
    """

    lease: int
    owner: str
    part: ShardRange | None
    renewed_at: float
    released: bool
    started_at: float | None = None
    ending: str = ""

    @property
    def may_live(self) -> bool:
        """It has not given the lease back, nor is it known to be dead."""
        return not self.released and not _is_dead_neighbour(self.owner)

    @property
    def at_work(self) -> bool:
        """It may live, and by this machine's clock it has renewed the lease of late."""
        return self.may_live and abs(time.time() - self.renewed_at) < LEASE_SECONDS

    def meets(self, part: ShardRange | None) -> bool:
        """The two have shards in common."""
        if self.part is None or part is None:
            return True
        return self.part[0] < part[1] and part[0] < self.part[1]

    def covers(self, part: ShardRange | None) -> bool:
        """It holds all of these shards."""
        if self.part is None or part is None:
            return self.part is None
        return self.part[0] <= part[0] and part[1] <= self.part[1]

    def __str__(self) -> str:
        host, pid, *_ = [*self.owner.split(" "), "?"]
        since = f", since {clock(self.started_at)}" if self.started_at else ""
        shards = "" if self.part is None else f", shards {range_text(self.part)}"
        return f"host {host}, pid {pid}{since}{shards}"


def clock(at: float) -> str:
    """A time of today as ``05:31``, of another day with its date."""
    there, now = time.localtime(at), time.localtime()
    form = "%H:%M" if there[:3] == now[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, there)


def holders_of(store: Store) -> list[Holder]:
    """Every run into this output, by its lease, in the order in which they began."""
    return _holders(store, _leases(store))


def _holders(store: Store, numbers: list[int]) -> list[Holder]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda number: _holder(store, number), numbers)
        return [holder for holder in found if holder is not None]


def _holder(store: Store, number: int) -> Holder | None:
    """None for a lease that cannot be read, as a cut one; its holder will write it anew.

    Raises:
        NewerFormat: it was written by a later version.
    """
    name = _lease_name(number)
    try:
        data = store.read_record(name)
        saved = read_document(_Saved, data, f"{store.url}/{name}", LEASE_VERSION, "")
    except (FileNotFoundError, DamagedRecord):
        return None
    facts = (saved.renewed_at, saved.released, saved.started_at, saved.ending)
    return Holder(number, saved.owner, saved.shards, *facts)


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
    part: ShardRange | None = None
    lost: threading.Event = field(default_factory=threading.Event)
    why_lost: str = TAKEN
    ending: str = ""
    gone: bool = False
    witness: str = ""
    started_at: float = field(default_factory=time.time)
    _end: threading.Event = field(default_factory=threading.Event)
    _strangers: set[int] = field(default_factory=set)  # later leases, of other parts

    def text(self, released: bool = False) -> bytes:
        saved = _Saved(
            owner=self.owner,
            renewed_at=time.time(),
            released=released,
            shards=self.part,
            started_at=self.started_at,
            ending=self.ending,
        )
        return json.dumps(asdict(saved)).encode()

    def beat(self, released: bool = False) -> None:
        """Renew it once: the heartbeat is its own next try."""
        self.store.impatient().put(_lease_name(self.number), self.text(released))

    def is_gone(self) -> bool:
        """The output was deleted or moved: its lease, or its witness, is there no more."""
        store = self.store.impatient()
        wanted = [_lease_name(self.number), *filter(None, [self.witness])]
        return not all(_is_there(store, name) for name in wanted)

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
        """Renew until released; call ``on_lost`` once if the run has no right to go on."""
        renewed = time.monotonic()
        while not self._end.wait(HEARTBEAT_SECONDS):
            why = ""
            try:
                if self.is_gone():
                    self.gone = True
                    why = _GONE.format(self.store.url)
                elif not self.still_held():
                    why = TAKEN
                else:
                    self.beat()
                    renewed = time.monotonic()
            except Exception as error:  # whatever it is, the lease is not renewed
                if time.monotonic() - renewed > LEASE_SECONDS:
                    why = f"the lease could not be renewed for {LEASE_SECONDS:.0f} s: {error}"
            if why:
                self.why_lost = why
                self.lost.set()
                on_lost(why)
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
    store: Store,
    on_lost: Callable[[str], None],
    part: ShardRange | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Iterator[Lease]:
    """Hold the output's lease, or that of a part of its shards, while the block runs.

    Raises:
        OutputBusy: another run holds it; names the holder.
    """
    lease = acquire_lease(store, part, say)
    thread = threading.Thread(target=lease.keep, args=(on_lost,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except KeyboardInterrupt:
        lease.ending = "interrupted"
        raise
    except BaseException as error:
        lease.ending = short(f"{type(error).__name__}: {redact(str(error))}")
        raise
    finally:
        lease.release(thread)


def acquire_lease(
    store: Store, part: ShardRange | None = None, say: Callable[[str], None] = lambda words: None
) -> Lease:
    """Take the next lease, if no run at work has shards in common with it."""
    owner = f"{_process_identity()} {uuid.uuid4().hex[:8]}"
    dead: set[int] = set()
    for _ in range(_TRIES):
        numbers = _leases(store)
        if _wait_for_doubtful(store, _holders(store, numbers), part, dead, say):
            continue
        lease = Lease(store, max(numbers, default=0) + 1, owner, part)
        alone = store.creates_alone()
        created = store.put_new(_lease_name(lease.number), lease.text())
        if not alone:  # the name may have been taken twice: the last to write it has it
            time.sleep(SETTLE_SECONDS)
            taker = _holder(store, lease.number)
            created = created and taker is not None and taker.owner == owner
        if created:
            lease.store = store.in_place()
            return lease
    raise OutputBusy(f"output {store.url}: other runs take its leases at the same moment")


def _wait_for_doubtful(
    store: Store,
    holders: list[Holder],
    part: ShardRange | None,
    dead: set[int],
    say: Callable[[str], None],
) -> bool:
    """Watch leases that by this clock were not renewed of late: clocks differ, a living run renews.

    Returns:
        Whether there were any; those that stayed as they were are ``dead`` from then on.

    Raises:
        OutputBusy: a run is at work.
    """
    known = [
        one
        for place, one in enumerate(holders)
        if one.meets(part)
        and one.may_live
        and one.lease not in dead
        # who took a later lease of the same shards has seen that this one was over
        and not any(later.covers(one.part) for later in holders[place + 1 :])
    ]
    for one in known:
        if one.at_work:
            raise OutputBusy(_busy(store, one))
    if not known:
        return False
    say(
        f"a run ({known[-1]}) has not given back its lease, last renewed at "
        f"{clock(known[-1].renewed_at)}: waiting {WATCH_SECONDS:.0f} s to see whether it lives"
    )
    time.sleep(WATCH_SECONDS)
    for one in known:
        now = _holder(store, one.lease)
        if now is not None and now.may_live and now.renewed_at != one.renewed_at:
            raise OutputBusy(_busy(store, now))
        dead.add(one.lease)
    return True


def _busy(store: Store, holder: Holder) -> str:
    return (
        f"output {store.url} is held by another run ({holder}); wait for it to end, or stop it. If "
        f"its machine is gone, try again in {LEASE_SECONDS:.0f} s"
    )


def _is_there(store: Store, name: str) -> bool:
    """By a listing: a plan may be of many megabytes, and the heartbeat asks every few seconds."""
    folder, _, base = name.rpartition("/")
    return base in store.list(folder)


def _leases(store: Store) -> list[int]:
    stems = (name.removesuffix(".json") for name in store.list(LEASES))
    numbers = (int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return sorted(numbers)


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
