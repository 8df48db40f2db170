"""What has been done, from storage alone: the plan, markers, failures, and who holds the lease."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from batchgen.errors import InputError, SpecError
from batchgen.plan import Plan, read_plan
from batchgen.spec import Spec, build
from batchgen.storage import Store

PLAN = "_batchgen/plan.json"
JOB = "_batchgen/job.yaml"
RECORDS = "_batchgen"
SHARDS = "_batchgen/shards"
FAILED = "_batchgen/failed"
REJECTS = "_batchgen/rejects"
LOGS = "_batchgen/logs"
DATA = "data"

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
    """Shard numbers by state, from one listing; ``numbers`` are those that are asked about."""

    numbers: range
    committed: frozenset[int]
    failed: frozenset[int]

    @property
    def pending(self) -> list[int]:
        """Shards to make, failed ones again included."""
        return [shard for shard in self.numbers if shard not in self.committed]

    def within(self, numbers: range) -> States:
        """The states of these shards alone."""
        return States(
            numbers,
            frozenset(shard for shard in self.committed if shard in numbers),
            frozenset(shard for shard in self.failed if shard in numbers),
        )


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
            return read_plan(self.store.read(PLAN), f"{self.store.url}/{PLAN}")
        except FileNotFoundError:
            return None

    def require_plan(self) -> Plan:
        plan = self.plan()
        if plan is None:
            raise InputError(f"output {self.store.url}: no {PLAN} there; nothing was run into it")
        return plan

    def freeze(self, plan: Plan, job: Spec) -> bool:
        """Write the plan, once, and what was asked (``job.yaml``); False if a plan is there."""
        new = self.store.put_new(PLAN, plan.to_json().encode())
        known = () if new else self.store.list(RECORDS)
        if JOB.rpartition("/")[2] not in known:  # a run may have died between the two
            self.store.put(JOB, job.to_yaml().encode())
        return new

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
        return States(range(plan.shards), frozenset(committed), frozenset(failed))

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

    def log(self, lease: int, lines: Sequence[str]) -> None:
        """Keep what the run of this lease has said so far."""
        text = "".join(f"{line}\n" for line in lines)
        self.store.impatient().put(f"{LOGS}/{lease:05d}.txt", text.encode())

    def logs(self) -> str:
        """What all runs on this output have said, the first one's first."""
        names = sorted(self.store.list(LOGS))
        return "".join(self.store.read(f"{LOGS}/{name}").decode() for name in names)

    def _numbers(self, folder: str) -> set[int]:
        matches = (_NUMBERED.match(name) for name in self.store.list(folder))
        return {int(match.group(1)) for match in matches if match}
