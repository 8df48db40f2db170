"""Rounds: after a run, plans the further samples that a quota or the policy asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from batchgen.curate.quota import (
    check_quota,
    next_round,
    record_of,
    standing_of,
    store_quota,
)
from batchgen.errors import (
    DamagedRecord,
    InputError,
    OutputBusy,
    RetryShard,
    SpecError,
    StorageFailed,
    VerifyFailed,
)
from batchgen.output.extension import BY_FILTER, dropped_samples, remade
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome
from batchgen.output.quota_record import keep_quota
from batchgen.output.tally import Tally
from batchgen.plan.extend import listed_parts, rows_of
from batchgen.plan.parts import Parts
from batchgen.plan.plan import Plan
from batchgen.report.finalize import finalize
from batchgen.spec.quota_section import Quota, Remake
from batchgen.spec.spec import Spec
from batchgen.storage import open_store

BUSY = 3  # exit code: shards are pending, another run generates them


class Make(Protocol):
    """One pass of a run over the pending shards."""

    def __call__(self, *, shards: str | None, overwrite: bool = False) -> Outcome: ...


def check_rounds(plan: Plan, ledger: Ledger | None = None) -> Plan:
    """Check before work starts that the rounds which a plan's spec asks for can be planned.

    Args:
        plan: of the first part.
        ledger: of the output, which may have further parts of this plan; None: they do not count.

    Returns:
        The plan.

    Raises:
        SpecError, InputError: see ``quota.check_quota``.
    """
    remake, quota = plan.spec.policy.remake, plan.spec.quota
    if remake is not None and quota is not None:
        because = "a quota makes further samples of its own; remove one of the two"
        raise SpecError("policy.remake", list(remake.reasons), "", because=because)
    for reason in remake.reasons if remake else ():
        if reason not in BY_FILTER:
            raise SpecError("policy.remake.reasons", reason, ", ".join(sorted(BY_FILTER)))
    if quota is not None:
        check_quota(quota, plan, _rows(plan, ledger))
    return plan


def _rows(plan: Plan, ledger: Ledger | None) -> int:
    """The rows that the output has or will have; extensions may have added some to the plan's."""
    try:
        first = ledger.plan() if ledger else None
        if ledger and first and first.fingerprint == plan.fingerprint:
            return rows_of(ledger.parts(), 0)
    except (DamagedRecord, InputError, RetryShard, StorageFailed):
        pass  # such an output has no plan for this check; the run says what is wrong with it
    return plan.rows


def in_rounds(
    spec: Spec,
    make: Make,
    shards: str | None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run, and then plan and run rounds until a quota is met, or nothing is left to make again.

    A round is planned when every shard before it is committed, and depends on these only. Whoever
    finds that first writes its plan; a run beside it takes over the same plan.

    Args:
        spec: of the run.
        make: runs the pending shards: all, or those of a range ("A:B"); with ``overwrite``, after
            it removed the output of earlier runs.
        shards, overwrite: for the first run.
        say: prints a line.
    """
    outcome = make(shards=shards, overwrite=overwrite)
    asked = spec.quota is not None or spec.policy.remake is not None
    if not asked or outcome.exit_code == VerifyFailed.exit_code:
        return outcome
    ledger = Ledger(open_store(spec.output.url))
    for part in _rounds(ledger, spec, say):
        if not ledger.add_part(part):
            say(f"part {part.place.part} was planned by another run")
        say(
            f"round {part.place.round} ({part.place.why}): {part.samples:,} further samples, "
            f"shards {part.numbers.start}:{part.numbers.stop}"
        )
        own = None if shards is None else f"{part.numbers.start}:{part.numbers.stop}"
        try:
            outcome = _together(outcome, make(shards=own))
        except OutputBusy as error:
            told = f"round {part.place.round} is planned, but another run holds it ({error})"
            return replace(outcome, pending=part.shards, exit_code=BUSY, message=told)
        if outcome.exit_code == VerifyFailed.exit_code:
            return outcome
    return _settled(ledger, spec.quota, outcome) if spec.quota else outcome


def _rounds(ledger: Ledger, spec: Spec, say: Callable[[str], None]) -> Iterator[Plan]:
    """Yields the part of each round, when the one before is complete."""
    while True:
        parts = ledger.parts()
        if ledger.states(parts).pending:
            return
        if spec.quota is not None:
            standing = standing_of(ledger, parts, spec.quota)
            for line in record_of(spec.quota, standing, parts).lines():
                say(line)
            plan = next_round(parts, spec.quota, standing)
        else:
            assert spec.policy.remake is not None
            plan = _remade(ledger, parts, spec.policy.remake)
        if plan is None:
            return
        yield plan


def _remade(ledger: Ledger, parts: Parts, remake: Remake) -> Plan | None:
    """The part that makes rejected samples again; None if there are none, or no round is left."""
    found = dropped_samples(ledger, parts, remake.reasons, "rejected")
    for base in sorted(found):
        times = _times_remade(parts, base)
        samples = [one for one in found[base] if times[one] < remake.rounds]
        own = [plan.place for plan in parts if plan.place.base == base]
        last = max((one.round for one in own if one.why == "remake"), default=0)
        if plan := remade(parts, base, samples, "remake", last + 1):
            return plan
    return None


def _times_remade(parts: Parts, base: int) -> Counter[tuple[int, int]]:
    """How often the policy made a sample (row, variant) again, until it was this one."""
    times = Counter[tuple[int, int]]()
    for plan in listed_parts(parts, base):
        one = plan.listed
        for row, variant, replaced in zip(
            one.rows.tolist(), one.variants.tolist(), one.instead_of.tolist(), strict=True
        ):
            times[row, variant] = times[row, replaced] + (plan.place.why == "remake")
    return times


def _settled(ledger: Ledger, quota: Quota, outcome: Outcome) -> Outcome:
    """The outcome of a quota; stores the selection ``quota`` and its counts."""
    parts = ledger.parts()
    if ledger.states(parts).pending:
        return outcome
    standing = standing_of(ledger, parts, quota)
    record = record_of(quota, standing, parts)
    keep_quota(ledger, record)
    store_quota(ledger, parts, quota, standing)
    whole = finalize(ledger.in_force(parts), ledger, Tally(parts.shards, parts.samples))
    code, message = record.ending(whole.failed)
    if whole.exit_code == VerifyFailed.exit_code:
        code, message = whole.exit_code, whole.message
    return replace(outcome, exit_code=code, message=message)


def _together(first: Outcome, then: Outcome) -> Outcome:
    """The outcome of several passes: counts of the last one, and what all of them made."""
    made, seconds = first.images_made + then.images_made, first.seconds + then.seconds
    started = first.start_up_s if first.start_up_s is not None else then.start_up_s
    after = None if started is None else round(made / max(1e-9, seconds - started), 3)
    return replace(
        then,
        images_made=made,
        seconds=round(seconds, 3),
        start_up_s=started,
        images_per_second=round(made / max(1e-9, seconds), 3),
        images_per_second_after_start_up=after,
    )
