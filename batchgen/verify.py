"""Proves from storage alone that every planned sample is there once, or among the rejects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from batchgen.errors import BatchgenError, VerifyFailed
from batchgen.holdings import is_litter
from batchgen.ledger import DATA, REJECTS, SHARDS, Ledger, Marker, States, Written, rejects_name
from batchgen.plan import Plan
from batchgen.writer import SCHEMAS, format_of, read_parquet

MAX_PROBLEMS = 100
_THREADS = 4
_REMEDY = "remove that marker from _batchgen/shards, and `batchgen resume` makes it again"


@dataclass
class Findings:
    """What verification saw. ``problems`` is empty exactly when everything adds up."""

    shards: int
    planned: int
    committed: int = 0
    pending: int = 0
    failed_shards: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    more_problems: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)
        else:
            self.more_problems += 1


@dataclass(frozen=True)
class ShardFacts:
    """One committed shard as read back: what is wrong with it, and its samples' key digests."""

    problems: tuple[str, ...]
    digests: bytes


def verify(ledger: Ledger, quick: bool = False) -> Findings:
    """Check an output against its plan.

    Every shard has a marker; each file it names is there with its size and SHA-256; counts add up
    to the plan; the shard's samples are exactly the planned ones; every image has the bytes that
    its ``sha256`` column says; no key stands twice in the whole output; nothing else lies in
    ``data/``. ``quick`` compares only listings and markers.
    """
    plan = ledger.require_plan()
    states = ledger.states(plan)
    findings = Findings(plan.shards, plan.samples)
    _check_states(ledger, plan, states, findings)
    digests: list[bytes] = []
    named: set[str] = set()
    unread: list[int] = []
    check: Callable[[Ledger, Plan, Marker], ShardFacts] = _full_check
    if quick:
        check = partial(_quick_check, _sizes(ledger))
    shards = sorted(states.committed)
    for shard, (marker, facts) in zip(
        shards, _each_shard(ledger, plan, shards, check), strict=True
    ):
        for problem in facts.problems:
            findings.problem(problem)
        digests.append(facts.digests)
        if marker is None:
            unread.append(shard)
        else:
            named |= {file.name for file in marker.files}
            _add(findings, marker)
    _check_strays(ledger, plan, named, unread, findings)
    _check_unique(b"".join(digests), findings)
    total = findings.accepted + findings.rejected + findings.failed
    if total != plan.samples:
        findings.problem(
            f"planned {plan.samples} samples, accounted for {total} "
            f"(accepted {findings.accepted}, rejected {findings.rejected}, "
            f"failed {findings.failed})"
        )
    return findings


def lost_files(ledger: Ledger, shards: Iterable[int]) -> list[str]:
    """Files that these shards' markers name and that are missing or of another size.

    From listings alone, so that a run's end and ``status`` can afford it.
    """
    sizes = _sizes(ledger)
    return [
        file.name
        for marker in ledger.markers(shards)
        for file in marker.files
        if sizes.get(file.name) != file.bytes
    ]


def damaged(url: str, names: Sequence[str]) -> tuple[int, str]:
    """The exit code and the message of an output that has lost what its markers name."""
    more = f" and {len(names) - 1} more files" if names[1:] else ""
    return VerifyFailed.exit_code, (
        f"{names[0]}{more} of {url}: missing or damaged, though committed; `batchgen verify {url} "
        f"--repair` withdraws the damaged shards, then `batchgen resume {url}` makes them again"
    )


def _sizes(ledger: Ledger) -> dict[str, int]:
    """Name -> size in bytes, of all files that markers may name."""
    return {
        f"{folder}/{name}": size
        for folder in (DATA, REJECTS, SCHEMAS)
        for name, size in ledger.store.find(folder).items()
    }


def _check_states(ledger: Ledger, plan: Plan, states: States, findings: Findings) -> None:
    findings.committed = len(states.committed)
    findings.failed_shards = len(states.failed)
    for shard in states.failed:
        first, stop = plan.sample_range(shard)
        findings.failed += stop - first
    findings.pending = plan.shards - findings.committed - findings.failed_shards
    for shard in sorted(states.failed):
        findings.problem(f"shard {shard} failed; `batchgen resume` tries it again")
    if findings.pending:
        first = next(s for s in states.pending if s not in states.failed)
        findings.problem(
            f"{findings.pending} shards are pending (the first is {first}); "
            "`batchgen resume` makes them"
        )
    for name in ledger.strays(plan):
        findings.problem(
            f"{SHARDS}/{name} is the marker of none of the plan's {plan.shards} shards"
        )


def _check_strays(
    ledger: Ledger, plan: Plan, named: set[str], unread: list[int], findings: Findings
) -> None:
    """Files that no marker can vouch for would be read as data.

    What may belong to a shard with an unreadable marker is that marker's problem.
    """
    form = format_of(plan)
    for folder in (DATA, REJECTS):
        found = ledger.store.find(folder)
        there = {f"{folder}/{name}" for name in found if not is_litter(name)}
        for name in sorted(there - named):
            if not any(
                name == rejects_name(shard) or form.owns(name, shard, plan.shards)
                for shard in unread
            ):
                findings.problem(f"{name} belongs to no committed shard")


def _each_shard(
    ledger: Ledger,
    plan: Plan,
    shards: Iterable[int],
    check: Callable[[Ledger, Plan, Marker], ShardFacts],
) -> Iterator[tuple[Marker | None, ShardFacts]]:
    def one(shard: int) -> tuple[Marker | None, ShardFacts]:
        try:
            marker = ledger.marker(shard)
        except BatchgenError as error:
            return None, ShardFacts((f"shard {shard}: {error}",), b"")
        if marker is None:
            return None, ShardFacts((f"shard {shard}: its marker vanished",), b"")
        try:
            return marker, check(ledger, plan, marker)
        except (BatchgenError, OSError, KeyError, ValueError, pa.ArrowException) as error:
            return marker, ShardFacts((f"shard {shard}: {error}",), b"")

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(one, shards)


def _add(findings: Findings, marker: Marker) -> None:
    findings.accepted += marker.counts.accepted
    findings.rejected += marker.counts.rejected
    findings.failed += marker.counts.failed
    findings.bytes += sum(file.bytes for file in marker.files)


def _marker_problems(plan: Plan, marker: Marker) -> list[str]:
    first, stop = plan.sample_range(marker.shard)
    problems = []
    if not marker.counts.add_up() or marker.counts.planned != stop - first:
        problems.append(
            f"shard {marker.shard}: counts {marker.counts} do not add up to its {stop - first}"
        )
    if not marker.is_of(plan):
        problems.append(f"shard {marker.shard}: was made for another plan")
    rows = {file.name: file.rows for file in marker.files}
    name = format_of(plan).file_name(marker.shard, plan.shards)
    if name is not None and name not in rows:
        problems.append(f"shard {marker.shard}: its marker names no data file")
    counts, dropped = marker.counts, rows.pop(rejects_name(marker.shard), 0)
    if (sum(rows.values()), dropped) != (counts.accepted, counts.rejected + counts.failed):
        problems.append(
            f"shard {marker.shard}: its files hold {sum(rows.values())} accepted and {dropped} "
            f"other samples, its counts are {counts}"
        )
    return problems


def _quick_check(sizes: dict[str, int], ledger: Ledger, plan: Plan, marker: Marker) -> ShardFacts:
    problems = _marker_problems(plan, marker)
    for file in marker.files:
        if sizes.get(file.name) != file.bytes:
            problems.append(
                f"{file.name}: {sizes.get(file.name)} bytes in storage, {file.bytes} in its marker"
            )
    return ShardFacts(tuple(problems), b"")


def _full_check(ledger: Ledger, plan: Plan, marker: Marker) -> ShardFacts:
    problems = _marker_problems(plan, marker)
    contents = {file.name: _read(ledger, file, problems) for file in marker.files}
    there = {name: data for name, data in contents.items() if data is not None}
    rejects = there.pop(rejects_name(marker.shard), None)
    seen: list[tuple[str, str, int]] = []
    if any(name.startswith(f"{DATA}/") for name in there):
        table = format_of(plan).read(there)
        seen += _identities(table)
        problems += _row_problems(marker, table, there)
        problems += _image_problems(marker.shard, table, whole=None not in contents.values())
    if rejects is not None:
        table = read_parquet(rejects)
        seen += _identities(table)
        problems += _row_problems(marker, table, (rejects_name(marker.shard),))
        problems += _outcome_problems(rejects_name(marker.shard), table, marker)
    problems += _sample_problems(plan, marker.shard, seen)
    digests = (hashlib.blake2b(key.encode(), digest_size=16).digest() for key, _, _ in seen)
    return ShardFacts(tuple(problems), b"".join(digests))


def _identities(table: pa.Table) -> list[tuple[str, str, int]]:
    """(key, source_id, variant) of the samples."""
    names = ("key", "source_id", "variant")
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def _read(ledger: Ledger, file: Written, problems: list[str]) -> bytes | None:
    try:
        data = ledger.store.read(file.name)
    except FileNotFoundError:
        problems.append(f"{file.name}: missing, though its marker names it; {_REMEDY}")
        return None
    if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        problems.append(f"{file.name}: not the bytes that its marker names; {_REMEDY}")
        return None
    return data


def _row_problems(marker: Marker, table: pa.Table, names: Container[str]) -> list[str]:
    said = sum(file.rows for file in marker.files if file.name in names)
    if table.num_rows == said:
        return []
    where = [file.name for file in marker.files if file.name in names and file.rows]
    return [f"{', '.join(where[:3])}: {table.num_rows} rows, the marker says {said}"]


def _image_problems(shard: int, table: pa.Table, whole: bool) -> list[str]:
    """Images that are not those of their row; one whose file is not whole was named already."""
    chunks = (chunk.field("bytes") for chunk in table.column("image").chunks)
    images = [image for chunk in chunks for image in chunk]
    keys, wanted = table.column("key").to_pylist(), table.column("sha256").to_pylist()
    return [
        f"shard {shard}: image {key} is not the bytes of its sha256 column"
        for key, image, digest in zip(keys, images, wanted, strict=True)
        if (whole or image.is_valid)
        and hashlib.sha256(image.as_buffer() or b"").hexdigest() != digest
    ]


def _outcome_problems(name: str, table: pa.Table, marker: Marker) -> list[str]:
    outcomes = table.column("outcome").to_pylist()
    found = (outcomes.count("rejected"), outcomes.count("failed"))
    wanted = (marker.counts.rejected, marker.counts.failed)
    if found == wanted:
        return []
    return [f"{name}: (rejected, failed) are {found}, shard {marker.shard}'s marker says {wanted}"]


def _sample_problems(plan: Plan, shard: int, seen: list[tuple[str, str, int]]) -> list[str]:
    """The shard's (source row, variant) pairs are exactly those of the plan."""
    found = [(source, variant) for _, source, variant in seen]
    wanted = set(planned_samples(plan, shard))
    problems = []
    for missing in sorted(wanted - set(found))[:5]:
        problems.append(f"shard {shard}: planned sample {missing} is nowhere")
    for extra in sorted(set(found) - wanted)[:5]:
        problems.append(f"shard {shard}: sample {extra} was never planned")
    if len(found) != len(set(found)):
        problems.append(f"shard {shard}: a sample stands twice")
    return problems


def planned_samples(plan: Plan, shard: int) -> Iterator[tuple[str, int]]:
    """(source_id, variant) of a shard's samples."""
    for sample in range(*plan.sample_range(shard)):
        row, variant = divmod(sample, plan.spec.variants)
        file, file_row = plan.locate(row)
        yield f"{file.name}#{file_row}", variant


def _check_unique(digests: bytes, findings: Findings) -> None:
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)  # (samples, 2)
    twice = len(halves) - len(np.unique(halves.view("<u8,<u8")))
    if twice:
        findings.problem(f"{twice} keys stand more than once in the output")
