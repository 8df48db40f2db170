"""Gives one run at a time the right to write an output or some of its shards: numbered leases."""

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

from batchgen.errors import BatchgenError, DamagedRecord, Interrupted, OutputBusy
from batchgen.output.shard_range import ShardRange, range_text
from batchgen.plain_text import short
from batchgen.secrets import redact
from batchgen.storage import Store
from batchgen.storage.documents import Count, Time, Version, read_document

LEASES = "_batchgen/lease"
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 5.0  # waited on stores that cannot refuse to create a name twice
_THREADS = 8
_TRIES = 20
LEASE_VERSION = 1
WATCH_SECONDS = 2.5 * HEARTBEAT_SECONDS  # long enough to see at least one renewal of a live run
TAKEN = "another run has taken over this output's lease"
_GONE = (
    "output {} was deleted or moved during the run; if it was moved, `resume` it where it is now"
)


@dataclass(frozen=True)
class _Saved:
    """A lease as it is stored."""

    owner: str
    renewed_at: Time
    released: bool = False
    shards: tuple[Count, Count] | None = None
    started_at: Time | None = None
    ending: str = ""
    version: Version = LEASE_VERSION


@dataclass(frozen=True)
class Holder:
    """The run that holds or held a lease, as its lease describes it.

    Attributes:
        part: the shards that it holds; None for all of them.
        renewed_at: seconds since the epoch, by its machine's clock.
        released: the run has released the lease.
        started_at: None in leases of older versions.
        ending: a sentence about how the run ended; empty while it works, or if it was killed.
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
        """Whether the lease is not released and its process is not known to be dead."""
        return not self.released and not _is_dead_neighbour(self.owner)

    @property
    def at_work(self) -> bool:
        """Whether it may live and, by this machine's clock, renewed the lease recently."""
        return self.may_live and abs(time.time() - self.renewed_at) < LEASE_SECONDS

    def meets(self, part: ShardRange | None) -> bool:
        """Whether it has shards in common with ``part``."""
        if self.part is None or part is None:
            return True
        return self.part[0] < part[1] and part[0] < self.part[1]

    def covers(self, part: ShardRange | None) -> bool:
        """Whether it holds all shards of ``part``."""
        if self.part is None or part is None:
            return self.part is None
        return self.part[0] <= part[0] and part[1] <= self.part[1]

    def __str__(self) -> str:
        host, pid, *_ = [*self.owner.split(" "), "?"]
        since = f", since {clock(self.started_at)}" if self.started_at else ""
        shards = "" if self.part is None else f", shards {range_text(self.part)}"
        return f"host {host}, pid {pid}{since}{shards}"


def clock(at: float) -> str:
    """A time of today as ``05:31``; of another day with the date."""
    there, now = time.localtime(at), time.localtime()
    form = "%H:%M" if there[:3] == now[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, there)


def holders_of(store: Store, folder: str = LEASES) -> list[Holder]:
    """The holder of every lease of this output, in the order of the leases' numbers."""
    return _holders(store, folder, _leases(store, folder))


def _holders(store: Store, folder: str, numbers: list[int]) -> list[Holder]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda number: _holder(store, folder, number), numbers)
        return [holder for holder in found if holder is not None]


def _holder(store: Store, folder: str, number: int) -> Holder | None:
    """The holder of a lease; None if the lease is missing or damaged, until its run renews it.

    Raises:
        NewerFormat: a later version wrote it.
    """
    name = _lease_name(folder, number)
    try:
        data = store.read_record(name)
        saved = read_document(_Saved, data, f"{store.url}/{name}", LEASE_VERSION, "")
    except (FileNotFoundError, DamagedRecord):
        return None
    facts = (saved.renewed_at, saved.released, saved.started_at, saved.ending)
    return Holder(number, saved.owner, saved.shards, *facts)


@dataclass
class Lease:
    """The right of one run to write an output, or some of its shards; a heartbeat renews it.

    Leases are numbered, and a lease is created only if its number is free: if several runs request
    the next number, exactly one gets it. A run has checked all lower leases before it takes one, so
    of two leases with common shards the higher one is valid. Old leases are kept as a history of
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
    folder: str = LEASES
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
        """Renew it once, without retries: the next heartbeat is the retry."""
        self.store.without_retries().put(_lease_name(self.folder, self.number), self.text(released))

    def is_gone(self) -> bool:
        """Whether the output was deleted or moved: its lease or its witness no longer exists."""
        store = self.store.without_retries()
        wanted = [_lease_name(self.folder, self.number), *filter(None, [self.witness])]
        return not all(_is_there(store, name) for name in wanted)

    def still_held(self) -> bool:
        """Whether no other run has taken a later lease with shards of this one."""
        store = self.store.without_retries()
        for number in _leases(store, self.folder):
            if number <= self.number or number in self._strangers:
                continue
            later = _holder(store, self.folder, number)
            if later is None or later.meets(self.part):
                return False
            self._strangers.add(number)
        return True

    def check(self) -> None:
        """Raise Interrupted if another run has taken the output over."""
        if self.lost.is_set():
            raise Interrupted(self.why_lost)

    def keep(self, on_lost: Callable[[str], None]) -> None:
        """Renew until released; call ``on_lost`` once if the run must stop."""
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
            except Exception as error:  # whatever the error is, the lease was not renewed
                if time.monotonic() - renewed > LEASE_SECONDS:
                    why = f"the lease could not be renewed for {LEASE_SECONDS:.0f} s: {error}"
            if why:
                self.why_lost = why
                self.lost.set()
                on_lost(why)
                return

    def release(self, heartbeat: threading.Thread | None = None) -> None:
        """Release the lease; the heartbeat is stopped first, since it would renew it again."""
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
    folder: str = LEASES,
) -> Iterator[Lease]:
    """Hold a lease on the output, or on the shards ``part``, while the block runs.

    ``folder`` is where the leases are: a score set has its own.

    Raises:
        OutputBusy: another run holds these shards; names the holder.
    """
    lease = acquire_lease(store, part, say, folder)
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
    store: Store,
    part: ShardRange | None = None,
    say: Callable[[str], None] = lambda words: None,
    folder: str = LEASES,
) -> Lease:
    """Take the next lease, unless an active run has shards in common with it."""
    owner = f"{_process_identity()} {uuid.uuid4().hex[:8]}"
    dead: set[int] = set()
    for _ in range(_TRIES):
        numbers = _leases(store, folder)
        if _wait_for_doubtful(store, folder, part, dead, say):
            continue
        lease = Lease(store, max(numbers, default=0) + 1, owner, part, folder=folder)
        alone = store.supports_create_only()
        created = store.put_new(_lease_name(folder, lease.number), lease.text())
        if not alone:  # two runs may have created the name: the one that wrote last gets it
            time.sleep(SETTLE_SECONDS)
            taker = _holder(store, folder, lease.number)
            created = created and taker is not None and taker.owner == owner
        if created:
            lease.store = store.in_place()
            return lease
    raise OutputBusy(
        f"output {store.url}: no lease after {_TRIES} tries, because other runs start on it at the "
        "same moment; try again"
    )


def _wait_for_doubtful(
    store: Store,
    folder: str,
    part: ShardRange | None,
    dead: set[int],
    say: Callable[[str], None],
) -> bool:
    """Wait to see whether leases that look outdated are renewed.

    By this machine's clock they were not renewed recently, but clocks differ; an active run renews
    its lease while this waits.

    Returns:
        Whether there were such leases; those that were not renewed are ``dead`` from then on.

    Raises:
        OutputBusy: a run is active.
    """
    holders = holders_of(store, folder)
    known = [
        one
        for place, one in enumerate(holders)
        if one.meets(part)
        and one.may_live
        and one.lease not in dead
        # a run that took a later lease on these shards has already seen that this one was over
        and not any(later.covers(one.part) for later in holders[place + 1 :])
    ]
    for one in known:
        if one.at_work:
            raise OutputBusy(_busy(store, one))
    if not known:
        return False
    say(
        f"an earlier run ({known[-1]}) did not release its lease, last renewed at "
        f"{clock(known[-1].renewed_at)}; waiting {WATCH_SECONDS:.0f} s to see whether it still runs"
    )
    time.sleep(WATCH_SECONDS)
    for one in known:
        now = _holder(store, folder, one.lease)
        if now is not None and now.may_live and now.renewed_at != one.renewed_at:
            raise OutputBusy(_busy(store, now))
        dead.add(one.lease)
    return True


def _busy(store: Store, holder: Holder) -> str:
    return (
        f"output {store.url} is held by another run ({holder}); wait until it ends, or stop it. If "
        f"its machine is gone, try again in {LEASE_SECONDS:.0f} s"
    )


def _is_there(store: Store, name: str) -> bool:
    """Whether a file exists. It lists the folder instead of reading the file.

    The heartbeat asks every few seconds, and a plan may have many megabytes.
    """
    folder, _, base = name.rpartition("/")
    return base in store.list(folder)


def _leases(store: Store, folder: str) -> list[int]:
    stems = (name.removesuffix(".json") for name in store.list(folder))
    numbers = (int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return sorted(numbers)


def _lease_name(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.json"


def _process_identity() -> str:
    """``host pid place start``; see ``_process_place`` and ``_process_start``."""
    pid = os.getpid()
    return f"{socket.gethostname()} {pid} {_process_place()} {_process_start(pid)}"


def _is_dead_neighbour(owner: str) -> bool:
    """Whether the owner ran on this boot of this machine, where its pid is known, and has ended."""
    host, pid, place, start, *_ = [*owner.split(" "), "", "", ""]
    if (host, place) != (socket.gethostname(), _process_place()) or place == "unknown":
        return False
    return pid.isdigit() and _process_start(int(pid)) != start


def _process_place() -> str:
    """This boot of this machine and its pid namespace, within which a pid names one process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()[:8]}-{os.readlink('/proc/self/ns/pid')[5:-1]}"
    except OSError:
        return "unknown"


def _process_start(pid: int) -> str:
    """Start of a process in clock ticks since boot; ``gone`` if it has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if fields[0] in ("Z", "X") else fields[19]
