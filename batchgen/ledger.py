"""What has been done, from storage alone: the plan, markers, failures, and who holds the lease."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from batchgen.errors import BatchgenError, InputError, OutputBusy, PlanChanged, SpecError
from batchgen.plan import Plan, read_plan
from batchgen.spec import Spec, build
from batchgen.storage import Store

PLAN = "_batchgen/plan.json"
JOB = "_batchgen/job.yaml"
SHARDS = "_batchgen/shards"
FAILED = "_batchgen/failed"
REJECTS = "_batchgen/rejects"
LEASES = "_batchgen/lease"
DATA = "data"

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 5.0  # where a store cannot create a name only once
_THREADS = 8
_NUMBERED = re.compile(r"^(\d+)\.json$")


@dataclass(frozen=True)
class Written:
    """One committed file: name below the output, size in bytes, SHA-256 of its bytes, rows."""

    name: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Counts:
    """How the planned samples of a shard ended: ``planned = accepted + rejected + failed``."""

    planned: int
    accepted: int
    rejected: int
    failed: int

    def add_up(self) -> bool:
        return self.planned == self.accepted + self.rejected + self.failed


@dataclass(frozen=True)
class Marker:
    """The object whose existence makes a shard committed; written after everything it names."""

    shard: int
    counts: Counts
    files: tuple[Written, ...]
    reasons: dict[str, int]
    truncated_prompts: int
    timings_s: dict[str, float]
    read_bytes: int
    batch_size: int
    micro_batches: int
    parameter_counts: dict[str, dict[str, int]]
    attempt: int
    environment: dict[str, str]
    spec_fingerprint: str
    finished_at: float

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class FailedMarker:
    """Why a shard could not be made. A later commit of the shard removes it."""

    shard: int
    planned: int
    error: str
    message: str
    traceback: str
    attempts: int
    host: str
    failed_at: float

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class States:
    """Shard numbers by state, from one listing."""

    shards: int
    committed: frozenset[int]
    failed: frozenset[int]

    @property
    def pending(self) -> list[int]:
        """Shards to make, failed ones again included."""
        return [shard for shard in range(self.shards) if shard not in self.committed]


def data_name(shard: int, shards: int) -> str:
    return f"{DATA}/train-{shard:05d}-of-{shards:05d}.parquet"


def rejects_name(shard: int) -> str:
    return f"{REJECTS}/{shard:05d}.parquet"


def _marker_name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.json"


def _failed_name(shard: int) -> str:
    return f"{FAILED}/{shard:05d}.json"


def parse_marker(data: bytes) -> Marker:
    """A marker from its JSON. Raises ValueError, KeyError or TypeError when it is not one."""
    tree: dict[str, Any] = json.loads(data)
    tree["counts"] = Counts(**tree["counts"])
    tree["files"] = tuple(Written(**one) for one in tree["files"])
    return Marker(**tree)


@dataclass(frozen=True)
class Ledger:
    """The records under ``_batchgen/`` of one output."""

    store: Store

    def plan(self) -> Plan | None:
        """The frozen plan, or None when no run has started here."""
        try:
            return read_plan(self.store.read(PLAN))
        except FileNotFoundError:
            return None

    def require_plan(self) -> Plan:
        plan = self.plan()
        if plan is None:
            raise InputError(f"output {self.store.url}: no {PLAN} there; nothing was run into it")
        return plan

    def freeze(self, plan: Plan, job: Spec) -> None:
        """Write the plan, once, and what was asked (``job.yaml``)."""
        if not self.store.put_new(PLAN, plan.to_json().encode()):
            raise PlanChanged(f"output {self.store.url}: another run has just planned it")
        self.store.put(JOB, job.to_yaml().encode())

    def job(self) -> Spec:
        """The spec as the user gave it to the first run.

        Raises:
            InputError: it is not there, or is damaged.
        """
        import yaml

        try:
            return build(yaml.safe_load(self.store.read(JOB)))
        except FileNotFoundError as error:
            raise InputError(
                f"output {self.store.url}: no {JOB} there; nothing was run into it"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError, SpecError) as error:
            raise InputError(
                f"{self.store.url}/{JOB}: no spec can be read from it ({error}); `batchgen run` "
                "with the spec of the first run goes on without it"
            ) from error

    def states(self, plan: Plan) -> States:
        planned = set(range(plan.shards))
        committed = self._numbers(SHARDS) & planned
        failed = (self._numbers(FAILED) & planned) - committed
        return States(plan.shards, frozenset(committed), frozenset(failed))

    def strays(self, plan: Plan) -> list[int]:
        """Numbers of markers that the plan has no shard for."""
        return sorted(self._numbers(SHARDS) - set(range(plan.shards)))

    def marker(self, shard: int) -> Marker | None:
        """The shard's marker, or None. Raises InputError when it is damaged."""
        try:
            return parse_marker(self.store.read(_marker_name(shard)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.store.url}/{_marker_name(shard)}: its marker cannot be read ({error}); "
                "remove it, and `batchgen resume` makes the shard again"
            ) from error

    def markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """The markers of committed shards, in order of number."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for marker in pool.map(self.marker, sorted(shards)):
                if marker is not None:
                    yield marker

    def commit(self, marker: Marker) -> Marker:
        """Make the shard committed. Another attempt's marker over the same files counts as ours."""
        if not self.store.put_new(_marker_name(marker.shard), marker.to_json()):
            other = self.marker(marker.shard)
            if other is not None and other.files == marker.files:
                return other
            self.store.put(_marker_name(marker.shard), marker.to_json())
        self.store.delete(_failed_name(marker.shard))
        return marker

    def fail(self, failed: FailedMarker) -> None:
        self.store.put(_failed_name(failed.shard), failed.to_json())

    def failures(self, shards: Iterable[int]) -> list[FailedMarker]:
        """The failed markers that are there; a shard may be committed while one reads."""
        found = []
        for shard in sorted(shards):
            with contextlib.suppress(FileNotFoundError):
                found.append(FailedMarker(**json.loads(self.store.read(_failed_name(shard)))))
        return found

    def _numbers(self, folder: str) -> set[int]:
        matches = (_NUMBERED.match(name) for name in self.store.list(folder))
        return {int(match.group(1)) for match in matches if match}


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
    if highest:
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
    try:
        tree = json.loads(store.read(_lease_name(number)))
    except (FileNotFoundError, ValueError):
        return
    left = tree["renewed_at"] + LEASE_SECONDS - time.time()
    if tree["released"] or left <= 0 or _is_dead_neighbour(tree["owner"]):
        return
    raise OutputBusy(
        f"output {store.url} is held by another run ({tree['owner']}); wait for it to end, or if "
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
    """Start of a process in clock ticks since boot; ``gone`` when it has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if fields[0] in ("Z", "X") else fields[19]
