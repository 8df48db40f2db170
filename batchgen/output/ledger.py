"""Reads and writes an output's records: the plan, the spec, markers, failed markers and logs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from batchgen.errors import DamagedRecord, InputError, PlanChanged, SpecError
from batchgen.output.marker import FailedMarker, Marker, parse_failed, parse_marker
from batchgen.plan.parts import Parts, Planned
from batchgen.plan.place import Listing, Place, read_listing
from batchgen.plan.plan import Plan
from batchgen.plan.saved import read_plan
from batchgen.spec.build import stored
from batchgen.spec.spec import Spec
from batchgen.spec.yaml_text import parse_yaml
from batchgen.storage import Store

PLAN = "_batchgen/plan.json"
JOB = "_batchgen/job.yaml"
RECORDS = "_batchgen"
PARTS = "_batchgen/parts"
SHARDS = "_batchgen/shards"
FAILED = "_batchgen/failed"
REJECTS = "_batchgen/rejects"
LOGS = "_batchgen/logs"
DATA = "data"
SHARD_FOLDERS = (DATA, REJECTS)  # of the files that a shard has for itself

_THREADS = 8  # reading many small markers: nearly all of the time is latency of the store


@dataclass(frozen=True)
class States:
    """Shard numbers by state, from one listing; ``numbers`` is the range they are taken from."""

    numbers: range
    committed: frozenset[int]
    failed: frozenset[int]

    @property
    def pending(self) -> list[int]:
        """Shards to generate, including failed ones."""
        return [shard for shard in self.numbers if shard not in self.committed]

    def within(self, numbers: range) -> States:
        """The states of only those of these shards that it has."""
        first, stop = self.numbers.start, self.numbers.stop
        return States(
            range(max(first, numbers.start), min(stop, numbers.stop)),
            frozenset(shard for shard in self.committed if shard in numbers),
            frozenset(shard for shard in self.failed if shard in numbers),
        )


def is_of_a_shard(name: str) -> bool:
    """Whether a file belongs to one shard alone, by its folder; schemas are shared."""
    return name.startswith(tuple(f"{folder}/" for folder in SHARD_FOLDERS))


def data_name(shard: int, shards: int) -> str:
    return f"{DATA}/train-{shard:05d}-of-{shards:05d}.parquet"


def rejects_name(shard: int) -> str:
    return f"{REJECTS}/{shard:05d}.parquet"


def marker_name(shard: int, folder: str = RECORDS) -> str:
    return f"{folder}/shards/{shard:05d}.json"


def part_name(part: int) -> str:
    return f"{PARTS}/{part:04d}.json" if part else PLAN


def listing_name(place: Place) -> str:
    """The file that lists a part's samples; two runs that plan a part do not share its name."""
    return f"{PARTS}/{place.part:04d}-{place.samples_sha256[:16]}.parquet"


def _shard_of(name: str) -> int | None:
    """The shard number in a marker's file name; None if it is not such a name."""
    stem = name.removesuffix(".json")
    is_ours = stem.isdecimal() and stem.isascii() and name == f"{int(stem):05d}.json"
    return int(stem) if is_ours else None


def _part_number(name: str) -> int | None:
    """The part of a plan's file name; None if it is not such a name."""
    stem = name.removesuffix(".json")
    is_ours = stem.isdecimal() and stem.isascii() and name == f"{int(stem):04d}.json"
    return int(stem) if is_ours else None


def _continues(plan: Plan, part: int, before: Plan) -> bool:
    """Whether a plan is that of the part after ``before``."""
    place = plan.place
    told = (place.part, place.first_shard, place.first_sample, place.before)
    samples = before.place.first_sample + before.samples
    return told == (part, before.numbers.stop, samples, before.fingerprint)


@dataclass(frozen=True)
class Ledger:
    """The records of one output, or of one of its score sets.

    Attributes:
        store: the output.
        folder: of the records: ``_batchgen/``, or that of the score set.
        command: what continues it, for messages.
    """

    store: Store
    folder: str = RECORDS
    command: str = "batchgen resume"

    def _marker_name(self, shard: int) -> str:
        return marker_name(shard, self.folder)

    def _failed_name(self, shard: int) -> str:
        return f"{self.folder}/failed/{shard:05d}.json"

    def plan(self) -> Plan | None:
        """The frozen plan of the first run, or None if no run has started here.

        Its output URL is replaced by this place, since the output may have been moved.
        """
        return self._part(0)

    def require_plan(self) -> Plan:
        plan = self.plan()
        if plan is None:
            raise InputError(f"output {self.store.url} has no {PLAN}: no run has started there")
        return plan

    def parts(self) -> Parts:
        """The plans of the output, in order: that of the first run, and those that extended it.

        Raises:
            InputError: there is none.
            DamagedRecord: one is missing, damaged, or does not continue the one before it.
        """
        found = [self.require_plan()]
        known = self.store.list(PARTS)
        numbers = sorted(filter(None, (_part_number(name) for name in known)))
        for number in numbers:
            plan = self._part(number) if number == len(found) else None
            before = found[-1]
            if plan is None or not _continues(plan, number, before):
                raise DamagedRecord(
                    f"{self.store.url}/{part_name(number)} does not continue "
                    f"{part_name(len(found) - 1)}; restore the files of {PARTS}"
                )
            found.append(plan)
        return Parts(found)

    def _part(self, part: int) -> Plan | None:
        """The plan of a part, None if there is none; with the output's present location."""
        place = f"{self.store.url}/{part_name(part)}"
        try:
            plan = read_plan(self.store.read_record(part_name(part)), place)
        except FileNotFoundError:
            return None
        here = plan.spec.output.model_copy(update={"url": self.store.url})
        plan = replace(plan, spec=plan.spec.model_copy(update={"output": here}))
        return replace(plan, listing=self._listing(plan)) if plan.place.listed else plan

    def _listing(self, plan: Plan) -> Listing:
        name = listing_name(plan.place)
        try:
            return read_listing(self.store.read(name), plan.place, f"{self.store.url}/{name}")
        except FileNotFoundError as error:
            raise DamagedRecord(
                f"{self.store.url}/{name}, which {part_name(plan.place.part)} names, is missing; "
                "restore it"
            ) from error

    def add_part(self, plan: Plan) -> bool:
        """Write the plan of a further part, its listed samples first; False if there is one."""
        if plan.listing is not None:
            self.store.put(listing_name(plan.place), plan.listing.to_parquet())
        return self.store.put_new(part_name(plan.place.part), plan.to_json().encode())

    def freeze(self, plan: Plan, job: Spec) -> bool:
        """Write the plan and the user's spec (``job.yaml``); False if there is a plan already."""
        new = self.store.put_new(PLAN, plan.to_json().encode())
        known = () if new else self.store.list(RECORDS)
        if JOB.rpartition("/")[2] not in known:  # a run may have crashed between the two writes
            self.store.put(JOB, job.to_yaml().encode())
        return new

    def job(self) -> Spec:
        """The spec as the user gave it to the last run.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            return stored(parse_yaml(self.store.read_record(JOB), JOB))
        except FileNotFoundError as error:
            raise InputError(
                f"output {self.store.url} has no {JOB}: no run has started there"
            ) from error
        except (InputError, SpecError) as error:
            raise InputError(
                f"{self.store.url}/{JOB} is not a valid spec ({error}); continue with "
                "`batchgen run` and the original spec file instead"
            ) from error

    def keep_job(self, asked: Spec) -> None:
        """Save the spec of the last run, which may differ in fields that are free on resume."""
        text = asked.to_yaml().encode()
        if self.store.read_record(JOB) != text:
            self.store.put(JOB, text)

    def in_force(self, parts: Planned) -> Parts:
        """The parts with the policy and quota of the last run, which may have changed them."""
        try:
            job = self.job()
        except InputError:
            return Parts(parts.plans)
        update = {"policy": job.policy, "quota": job.quota}
        return Parts(
            replace(plan, spec=plan.spec.model_copy(update=update)) for plan in parts.plans
        )

    def states(self, plan: Planned) -> States:
        """The states of the shards of a part, or of all parts."""
        return self.states_of(plan.numbers)

    def states_of(self, numbers: range) -> States:
        """The states of the shards with these numbers."""
        committed = frozenset(one for one in self._numbers("shards") if one in numbers)
        failed = frozenset(one for one in self._numbers("failed") if one in numbers)
        return States(numbers, committed, failed - committed)

    def strays(self, plan: Planned) -> list[str]:
        """Names of files among the markers that belong to no shard of the plan."""
        planned = plan.numbers
        names = [name for name in self.store.list(SHARDS) if name.endswith(".json")]
        return sorted(name for name in names if _shard_of(name) not in planned)

    def marker(self, shard: int) -> Marker | None:
        """The shard's marker, or None.

        Raises:
            DamagedRecord: it is not a marker, or that of another shard.
            NewerFormat: a later version wrote it.
        """
        place = f"{self.store.url}/{self._marker_name(shard)}"
        remedy = f"`{self.command}` generates the shard again"
        try:
            marker = parse_marker(self.store.read_record(self._marker_name(shard)), place, remedy)
        except FileNotFoundError:
            return None
        if marker.shard != shard:
            raise DamagedRecord(f"{place} is the marker of shard {marker.shard}; {remedy}")
        return marker

    def committed(self, plan: Plan, shard: int) -> Marker | None:
        """The shard's marker if it can be read; None if the shard must be generated.

        Raises:
            PlanChanged: it belongs to another plan.
            NewerFormat: a later version wrote it.
        """
        try:
            marker = self.marker(shard)
        except DamagedRecord:
            return None
        if marker is not None and not marker.is_of(plan):
            raise self.foreign(shard)
        return marker

    def foreign(self, shard: int) -> PlanChanged:
        """The error to raise for a marker that belongs to another plan."""
        return PlanChanged(
            f"{self.store.url}/{self._marker_name(shard)} belongs to another plan, with other "
            "inputs, settings or weights; restore this output's own marker and data, or delete "
            f"this marker: `{self.command}` then generates the shard again"
        )

    def markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """The markers that can be read, by shard number; shards without one are left out."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for marker in pool.map(self._readable, sorted(shards)):
                if marker is not None:
                    yield marker

    def _readable(self, shard: int) -> Marker | None:
        try:
            return self.marker(shard)
        except DamagedRecord:
            return None

    def commit(self, marker: Marker) -> Marker:
        """Commit the shard, unless another attempt has committed it: the first marker wins.

        The first marker is replaced only if it is damaged or storage no longer has the files that
        it names; then the files of this attempt have replaced those.

        Returns:
            The marker that is valid now.

        Raises:
            PlanChanged: there is a marker of another plan.
        """
        if not self.store.put_new(self._marker_name(marker.shard), marker.to_json()):
            first = self._readable(marker.shard)
            if first is not None and not first.shares_plan(marker):
                raise self.foreign(marker.shard)
            if first is not None and (first.files == marker.files or self._holds(first)):
                self._remove_others(marker, first)
                return first
            self.store.put(self._marker_name(marker.shard), marker.to_json())
        self.store.delete(self._failed_name(marker.shard))
        return marker

    def _remove_others(self, marker: Marker, first: Marker) -> None:
        """Delete files of this attempt that the first one did not write, except shared schemas."""
        for name in {one.name for one in marker.files} - {one.name for one in first.files}:
            if is_of_a_shard(name):
                self.store.delete(name)

    def _holds(self, marker: Marker) -> bool:
        """Whether every file that the marker names exists with its bytes."""
        try:
            return all(
                hashlib.sha256(self.store.read(file.name)).hexdigest() == file.sha256
                for file in marker.files
            )
        except (FileNotFoundError, InputError):
            return False

    def withdraw(self, shard: int) -> None:
        """Make a committed shard pending again; its files stay."""
        self.store.delete(self._marker_name(shard))

    def fail(self, failed: FailedMarker) -> None:
        self.store.put(self._failed_name(failed.shard), failed.to_json())

    def failures(self, shards: Iterable[int]) -> list[FailedMarker]:
        """The failed markers of these shards; some may be missing, if a shard was just committed.

        For one that cannot be read, a failed marker with the reading error as its message.
        """
        found = (self._failure(shard) for shard in sorted(shards))
        return [failure for failure in found if failure is not None]

    def _failure(self, shard: int) -> FailedMarker | None:
        place = f"{self.store.url}/{self._failed_name(shard)}"
        remedy = f"`{self.command}` retries the shard"
        try:
            failed = parse_failed(self.store.read_record(self._failed_name(shard)), place, remedy)
        except FileNotFoundError:
            return None
        except DamagedRecord as error:
            return FailedMarker(shard, error=type(error).__name__, message=str(error))
        return replace(failed, shard=shard)

    def log(self, lease: int, lines: Sequence[str]) -> None:
        """Save the messages so far of the run that holds this lease."""
        text = "".join(f"{line}\n" for line in lines)
        self.store.without_retries().put(f"{self.folder}/logs/{lease:05d}.txt", text.encode())

    def logs(self) -> str:
        """The messages of all runs on this output, the oldest run first."""
        names = sorted(self.store.list(LOGS))
        return "".join(self.store.read(f"{LOGS}/{name}").decode(errors="replace") for name in names)

    def _numbers(self, kind: str) -> Iterator[int]:
        numbers = (_shard_of(name) for name in self.store.list(f"{self.folder}/{kind}"))
        return (number for number in numbers if number is not None)
