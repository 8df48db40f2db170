"""Plans further parts of an output as a user asks for them, and keeps them in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from batchgen.errors import InputError, OutputBusy, SpecError, nearest
from batchgen.output.ledger import Ledger, part_name
from batchgen.output.rejects import dropped_of
from batchgen.plan.extend import (
    Samples,
    listed_part,
    listed_parts,
    more_input,
    more_rows,
    more_variants,
    next_variant,
)
from batchgen.plan.parts import Parts, Planned
from batchgen.plan.place import NOTHING
from batchgen.plan.plan import Plan
from batchgen.plan.saved import read_plan
from batchgen.reasons import FAILURES
from batchgen.records import Dropped
from batchgen.spec.spec import Spec
from batchgen.spec.splits import OTHER_SPLIT
from batchgen.stages.scorers.filters import FILTERS

OUTCOMES = ("rejected", "failed")
# Reasons that depend on the generated image: another seed may give an image that is accepted.
BY_FILTER = frozenset(one.reason for one in FILTERS)
BY_IMAGE = BY_FILTER | FAILURES.keys()


@dataclass(frozen=True)
class Extension:
    """What is added to an output; exactly one of the first four is given.

    Attributes:
        variants: number of further variants of every row.
        limit: most further rows of the input.
        input: another input, with the same columns.
        again: ``rejected`` or ``failed``: these samples, with new variant numbers and seeds.
        reason: with ``again``: only those with this reason.
    """

    variants: int | None = None
    limit: int | None = None
    input: str | None = None
    again: str | None = None
    reason: str | None = None


def further_parts(ledger: Ledger, wanted: Extension, asked: Spec) -> list[Plan]:
    """The parts that the extension adds; writes nothing. ``asked`` is the user's spec.

    Raises:
        SpecError: a value is not allowed.
        InputError: there is nothing to add, or an input cannot be used.
    """
    parts = ledger.parts()
    if wanted.variants is not None:
        return more_variants(parts, wanted.variants)
    if wanted.limit is not None:
        return more_rows(parts, wanted.limit)
    if wanted.input is not None:
        return more_input(parts, wanted.input, asked.labels)
    if wanted.again not in OUTCOMES:
        raise SpecError("--again", wanted.again, ", ".join(OUTCOMES))
    return _again(ledger, parts, wanted.again, wanted.reason)


def extend(ledger: Ledger, plans: Iterable[Plan]) -> None:
    """Add planned parts to the output.

    Raises:
        OutputBusy: another process added a part meanwhile.
    """
    for plan in plans:
        read_plan(plan.to_json(), "the new part")  # a part that cannot be read blocks the output
        if not ledger.add_part(plan):
            raise OutputBusy(
                f"output {ledger.store.url}: another process added "
                f"{part_name(plan.place.part)} meanwhile; repeat the command"
            )


def remade(
    parts: Parts, base: int, samples: Iterable[tuple[int, int]], why: str, round: int = 0
) -> Plan | None:
    """A part that replaces these samples (row, variant) of an input; None if there are none."""
    done = {
        pair
        for plan in listed_parts(parts, base)
        for pair in zip(plan.listed.rows.tolist(), plan.listed.instead_of.tolist(), strict=True)
    }
    first = next_variant(parts, base)
    extra = Counter[int]()
    wanted: Samples = []
    for row, variant in sorted(set(samples) - done):
        wanted.append((row, first + extra[row], variant))
        extra[row] += 1
    return listed_part(parts, base, wanted, why, round) if wanted else None


def dropped_samples(
    ledger: Ledger, parts: Parts, reasons: Iterable[str], outcome: str
) -> dict[int, list[tuple[int, int]]]:
    """The samples (row, variant) of committed shards that were dropped, by input."""
    wanted, found = frozenset(reasons), defaultdict[int, list[tuple[int, int]]](list)
    for plan in parts:
        firsts = first_rows(plan)
        for one in _dropped(ledger, plan, outcome):
            if one.reason in wanted:
                found[plan.place.base].append((row_of(firsts, one.source_id), one.variant))
    return found


def replaced(ledger: Ledger, parts: Planned, shards: Collection[int]) -> Counter[str]:
    """Outcome -> the number of samples of committed shards that later parts make again."""
    done = {
        (plan.place.base, row, variant)
        for plan in parts.plans
        if plan.place.listed
        for row, variant in zip(
            plan.listed.rows.tolist(), plan.listed.instead_of.tolist(), strict=True
        )
        if variant != NOTHING
    }
    found = Counter[str]()
    for plan in parts.plans if done else ():
        firsts, base = first_rows(plan), plan.place.base
        for one in dropped_of(ledger, [number for number in plan.numbers if number in shards]):
            is_done = (base, row_of(firsts, one.source_id), one.variant) in done
            if is_done and one.reason != OTHER_SPLIT:
                found[one.outcome] += 1
    return found


def first_rows(plan: Plan) -> dict[str, int]:
    """Name of each input file -> the number of its first row in the input."""
    firsts, row = {}, 0
    for file in plan.files:
        firsts[file.name] = row
        row += file.rows
    return firsts


def row_of(firsts: dict[str, int], source_id: str) -> int:
    """The number of a row in the input, from its file and place."""
    name, _, row = source_id.rpartition("#")
    return firsts[name] + int(row)


def _again(ledger: Ledger, parts: Parts, outcome: str, reason: str | None) -> list[Plan]:
    counts = Counter(one.reason for plan in parts for one in _dropped(ledger, plan, outcome))
    if reason is not None and reason not in counts:
        known = sorted(counts)
        raise InputError(
            f"output {ledger.store.url} has no {outcome} sample with the reason {reason!r}; it has "
            f"{', '.join(known) or 'none at all'}{nearest(reason, known)}"
        )
    reasons = [reason] if reason is not None else [one for one in counts if one in BY_IMAGE]
    samples = dropped_samples(ledger, parts, reasons, outcome)
    added: list[Plan] = []
    for base in sorted(samples):
        plan = remade(Parts([*parts, *added]), base, samples[base], "again")
        added += [] if plan is None else [plan]
    if not added:
        others = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
        raise InputError(
            f"output {ledger.store.url} has no {outcome} sample to make again"
            + (f": it has {others}" if others else "")
            + (
                "; those that depend on the image were made again already, and a new seed does not "
                "change the others: name one with --reason if its cause is gone"
                if others
                else ""
            )
        )
    return added


def _dropped(ledger: Ledger, plan: Plan, outcome: str) -> Iterator[Dropped]:
    for one in dropped_of(ledger, ledger.states(plan).committed):
        if one.outcome == outcome:
            yield one
