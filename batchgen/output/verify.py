"""Proves from storage that every planned sample is either in ``data/`` once or in the rejects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from batchgen.errors import BatchgenError, DamagedRecord, SpecError, VerifyFailed
from batchgen.output.finished import signs_again
from batchgen.output.formats import SCHEMAS, Format, format_of
from batchgen.output.holdings import is_litter
from batchgen.output.ledger import SHARD_FOLDERS, SHARDS, Ledger, States, marker_name, rejects_name
from batchgen.output.marker import Marker
from batchgen.output.proof import SKIPPABLE, Proof, Prover
from batchgen.output.score_proof import Flaw, flaws_of
from batchgen.plan.keys import row_key
from batchgen.plan.parts import Parts, planned_twice

MAX_PROBLEMS = 100
_THREADS = 4  # each holds one shard in memory
_NAMED = 8


@dataclass
class Findings:
    """The result of verification. ``problems`` is empty exactly if the output matches its plan.

    Attributes:
        damaged: shards of which storage lost or changed something after the commit.
        lost: missing and changed files of these shards.
        other: undamaged shards that do not match the plan.
        strays: files in ``data/`` and among the records that belong to no shard.
        skipped: checks that were skipped.
        flaws: what is wrong with score sets.
        signed: whether it is a signed copy, whose shards `export` makes and no run.
    """

    shards: int
    planned: int
    committed: int = 0
    pending: int = 0
    failed_shards: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    bytes: int = 0
    damaged: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    other: list[int] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    more_problems: int = 0
    signed: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)
        else:
            self.more_problems += 1

    def sentence(self, url: str) -> str:
        """The result in one line, with what to do next."""
        skipped = f"; not checked: {', '.join(self.skipped)}" if self.skipped else ""
        if self.ok:
            return (
                f"verified: planned {self.planned} = accepted {self.accepted} + rejected "
                f"{self.rejected} + failed {self.failed}; {self.committed} of {self.shards} shards "
                f"committed, {self.bytes:,} bytes{skipped}"
            )
        return f"NOT VERIFIED: {'; '.join(self._wrong(url)) or self.problems[0]}{skipped}"

    def makes(self, url: str) -> str:
        """The command that makes missing shards."""
        return signs_again(url) if self.signed else f"`batchgen resume {url}`"

    def _wrong(self, url: str) -> Iterator[str]:
        resume = self.makes(url)
        if self.damaged:
            yield (
                f"{len(self.damaged)} of {self.shards} shards are damaged "
                f"({numbers(self.damaged)}): `batchgen verify {url} --repair` withdraws them, "
                f"then {resume} regenerates them"
            )
        if self.strays and not self.other:  # with a wrong plan, every file would be a stray
            yield (
                f"files that belong to no shard: {len(self.strays)}; `batchgen verify {url} "
                "--repair` sets them aside"
            )
        if self.other:
            yield (
                f"{len(self.other)} of {self.shards} shards do not match the plan "
                f"({numbers(self.other)}): remove their markers ({marker_name(self.other[0])}"
                f"{', ...' if self.other[1:] else ''}), and {resume} regenerates them"
            )
        if self.flaws:
            names = sorted({flaw.name for flaw in self.flaws})
            yield (
                f"score sets are damaged ({', '.join(names)}): `batchgen verify {url} --repair` "
                f"withdraws the damaged shards, then `batchgen score {url} --name {names[0]}` "
                "scores them again"
            )
        undone = self.pending + self.failed_shards
        if undone:
            yield f"{undone} of {self.shards} shards are pending or failed: {resume} generates them"


def numbers(shards: Sequence[int]) -> str:
    """The first shard numbers, for a message."""
    return ", ".join(map(str, shards[:_NAMED])) + (", ..." if shards[_NAMED:] else "")


def verify(ledger: Ledger, quick: bool = False, skip: Collection[str] = ()) -> Findings:
    """Check an output against its plan.

    It proves that every shard has a marker of this plan; that each file it names exists with its
    size and SHA-256; that counts add up to the plan; that the shard's samples are exactly the
    planned ones; that keys, seeds, settings and columns follow from the plan; that every image
    matches its ``sha256`` column and can be decoded at its size; that no key occurs twice in the
    output; that ``data/`` contains nothing else; and that the scores of each score set are those of
    the shard's samples.

    Args:
        ledger: the ledger of the output.
        quick: check only markers and listings.
        skip: checks to leave out: ``decode``.

    Raises:
        SpecError: there is no such check.
        InputError, DamagedRecord, NewerFormat: the output has no plan, or it cannot be read.
    """
    for name in skip:
        if name not in SKIPPABLE:
            raise SpecError("--skip", name, ", ".join(SKIPPABLE))
    parts = ledger.parts()
    states = ledger.states(parts)
    findings = Findings(parts.shards, parts.samples, signed=parts[0].spec.output.signed)
    findings.skipped = ["everything but listings and markers"] if quick else sorted(skip)
    _check_states(parts, states, findings)
    provers = provers_of(ledger, parts, skip)
    digests: list[bytes] = []
    named: set[str] = set()
    sound: set[int] = set()
    shards = sorted(states.committed)
    for shard, (marker, proof) in zip(shards, _each_shard(provers, shards, quick), strict=True):
        for problem in proof.problems:
            findings.problem(problem)
        if proof.damaged:
            findings.damaged.append(shard)
            findings.lost += proof.lost
        elif proof.problems and marker is not None:
            findings.other.append(shard)
        digests.append(proof.digests)
        if marker is not None:
            _add(findings, marker)
            if not proof.broken:
                sound.add(shard)
                named |= {file.name for file in marker.files}
    _check_strays(provers, named, sound, findings)
    _check_unique(parts, b"".join(digests), findings)
    _check_sum(findings)
    findings.flaws = flaws_of(ledger, quick)
    for flaw in findings.flaws:
        findings.problem(flaw.text)
    return findings


class LostFiles:
    """Collects files that markers name and that are missing or have another size.

    It reads only listings, so it is quick enough for ``status`` and the end of a run.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._sizes = _sizes(ledger)
        self.names: list[str] = []

    def see(self, marker: Marker) -> None:
        self.names += [
            file.name for file in marker.files if self._sizes.get(file.name) != file.bytes
        ]


def damaged(url: str, names: Sequence[str]) -> tuple[int, str]:
    """The exit code and message for an output that lost files which its markers name."""
    others = len(names) - 1
    more = f" and {others} more file{'s' if others > 1 else ''}" if others else ""
    return VerifyFailed.exit_code, (
        f"{names[0]}{more} of {url}: missing or damaged, though committed; `batchgen verify {url} "
        f"--repair` withdraws the damaged shards, then `batchgen resume {url}` regenerates them"
    )


def _sizes(ledger: Ledger) -> dict[str, int]:
    """Name -> size in bytes of all files that markers may name."""
    return {
        f"{folder}/{name}": size
        for folder in (*SHARD_FOLDERS, SCHEMAS)
        for name, size in ledger.store.find(folder).items()
    }


@dataclass(frozen=True)
class Provers:
    """One prover for each part of an output."""

    parts: Parts
    each: tuple[Prover, ...]

    @property
    def ledger(self) -> Ledger:
        return self.each[0].ledger

    def of(self, shard: int) -> Prover:
        """The prover of the shard's part."""
        return self.each[self.parts.of(shard).place.part]


def provers_of(
    ledger: Ledger, parts: Parts, skip: Collection[str] = (), whole: bool = False
) -> Provers:
    """The provers of an output; see ``Prover``."""
    sizes = _sizes(ledger)
    return Provers(parts, tuple(Prover(ledger, plan, sizes, skip, whole) for plan in parts))


def exporting(ledger: Ledger, parts: Parts) -> Provers:
    """Provers for shards to be exported: they read all columns and decode no images."""
    return provers_of(ledger, parts, SKIPPABLE, whole=True)


def _check_states(plan: Parts, states: States, findings: Findings) -> None:
    findings.committed = len(states.committed)
    findings.failed_shards = len(states.failed)
    findings.failed += sum(plan.samples_of(shard) for shard in states.failed)
    findings.pending = plan.shards - findings.committed - findings.failed_shards
    for shard in sorted(states.failed):
        findings.problem(f"shard {shard} failed; `batchgen resume` retries it")
    if findings.pending:
        first = next(s for s in states.pending if s not in states.failed)
        findings.problem(
            f"{findings.pending} of {plan.shards} shards are pending (the first is {first}); "
            f"`batchgen {'export --sign' if findings.signed else 'resume'}` generates them"
        )


def _check_strays(provers: Provers, named: set[str], sound: set[int], findings: Findings) -> None:
    """Find files that no marker names: readers of ``data/`` would take them for results.

    Files that may belong to a shard without a valid marker do not count: they are overwritten when
    the shard is generated.
    """
    plan, form = provers.parts, format_of(provers.parts[0])
    undone = {rejects_name(shard) for shard in plan.numbers if shard not in sound}
    for name in sorted(provers.each[0].sizes.keys() - named):
        shard = _shard_of(form, name, plan)
        theirs = name in undone or (shard is not None and shard not in sound)
        if not theirs and not name.startswith(f"{SCHEMAS}/") and not is_litter(name):
            findings.strays.append(name)
            findings.problem(f"{name} belongs to no committed shard")
    for name in provers.ledger.strays(plan):
        findings.strays.append(f"{SHARDS}/{name}")
        findings.problem(
            f"{SHARDS}/{name} is not the marker of one of the plan's {plan.shards} shards"
        )


def _shard_of(form: Format, name: str, parts: Parts) -> int | None:
    """The shard of an output to which a file belongs; None if to none."""
    for plan in parts:
        shard = form.shard_of(name, plan.numbers.stop)
        if shard is not None and shard in plan.numbers:
            return shard
    return None


def _each_shard(
    provers: Provers, shards: Iterable[int], quick: bool
) -> Iterator[tuple[Marker | None, Proof]]:
    def one(shard: int) -> tuple[Marker | None, Proof]:
        proof, prover = Proof(shard), provers.of(shard)
        try:
            marker = prover.ledger.marker(shard)
        except BatchgenError as error:
            proof.add(str(error))
            proof.broken = isinstance(error, DamagedRecord)
            return None, proof
        if marker is None:
            proof.add("its marker was removed during the verification")
            return None, proof
        return marker, prover.listed(marker) if quick else prover.read(marker)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(one, shards)


def _add(findings: Findings, marker: Marker) -> None:
    findings.accepted += marker.counts.accepted
    findings.rejected += marker.counts.rejected
    findings.failed += marker.counts.failed
    findings.bytes += sum(file.bytes for file in marker.files)


def _check_unique(parts: Parts, digests: bytes, findings: Findings) -> None:
    """Check that keys are unique. Keys made from file names and row numbers need no reading."""
    inputs = {plan.place.base: plan.files for plan in parts if not plan.spec.input.columns.key}
    files = [file for each in inputs.values() for file in each]
    if len({row_key(file.name, 0) for file in files}) < len(files):
        findings.problem("two input files of the plan give their rows the same keys")
    if parts.spec.input.columns.key is None:
        if common := planned_twice(parts):
            findings.problem(common)
        return
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)  # (samples, 2)
    twice = len(halves) - len(np.unique(halves.view("<u8,<u8")))
    if twice:
        findings.problem(f"keys that occur more than once in the output: {twice}")


def _check_sum(findings: Findings) -> None:
    total = findings.accepted + findings.rejected + findings.failed
    if total != findings.planned and not findings.problems:
        findings.problem(
            f"planned {findings.planned} samples, but accounted for {total} "
            f"(accepted {findings.accepted}, rejected {findings.rejected}, "
            f"failed {findings.failed})"
        )
