"""Computes a run's outcome: counts from markers, its exit code and message, and early stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from batchgen.errors import BatchgenError, InputError, Interrupted
from batchgen.output.extension import replaced
from batchgen.output.ledger import PLAN, RECORDS, Ledger, States
from batchgen.output.marker import Example, FailedMarker, Marker
from batchgen.output.tally import Tally
from batchgen.output.verify import LostFiles, damaged
from batchgen.plain_text import short
from batchgen.plan.parts import Planned
from batchgen.secrets import redact

MIN_BAD_SHARDS = 3  # fewer may be an accident
MIN_REJECTS = 100  # fewer rejects say little about the remaining rows
SHOWN_REASONS = 5


@dataclass(frozen=True)
class Reason:
    """A reason for which samples are not in ``data/``, their number, and one example."""

    reason: str
    count: int
    example: Example | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in numbers that ``verify`` can prove.

    ``images_made`` and the fields after it are about this run only; the counts before it are about
    all runs. ``images_per_second`` is over all of this run's ``seconds``; ``start_up_s`` are those
    of them before work on the first shard began, and ``images_per_second_after_start_up`` is over
    the others. Both are None if no work began.
    """

    output: str
    shards: int
    planned: int
    committed: int
    failed_shards: int
    pending: int
    accepted: int
    rejected: int
    failed: int
    truncated_prompts: int
    reasons: tuple[Reason, ...]
    images_made: int
    seconds: float
    start_up_s: float | None
    images_per_second: float
    images_per_second_after_start_up: float | None
    exit_code: int
    message: str


def outcome_of(counted: Tally, run: Tally, url: str, exit_code: int, message: str) -> Outcome:
    """The outcome of ``run``; ``counted`` is the tally of the output's markers after it."""
    start_up_s = run.start_up_s
    return Outcome(
        output=url,
        shards=counted.shards,
        planned=counted.samples,
        committed=counted.committed,
        failed_shards=counted.failed_shards,
        pending=counted.shards - counted.committed - counted.failed_shards,
        accepted=counted.accepted,
        rejected=counted.rejected,
        failed=counted.failed,
        truncated_prompts=counted.truncated,
        reasons=reasons_of(counted),
        images_made=run.accepted_now,
        seconds=round(run.seconds, 3),
        start_up_s=None if start_up_s is None else round(start_up_s, 3),
        images_per_second=round(run.overall_rate, 3),
        images_per_second_after_start_up=None if start_up_s is None else round(run.rate, 3),
        exit_code=exit_code,
        message=message,
    )


def take_stock(
    plan: Planned,
    ledger: Ledger,
    states: States,
    see: Callable[[Marker], None] = lambda marker: None,
) -> tuple[Tally, States]:
    """The counts so far, and the states without the shards whose marker cannot be read.

    ``see`` is called with each marker, so that each is read only once for all purposes.

    Raises:
        PlanChanged: a marker belongs to another plan.
    """
    samples = plan.samples_in(states.numbers)
    policy = plan.spec.policy
    tally = Tally(len(states.numbers), samples, policy.failed_limit, policy.rejected_limit)
    committed = set()
    for marker in ledger.markers(states.committed):
        if not marker.is_of(plan.of(marker.shard)):
            raise ledger.foreign(marker.shard)
        committed.add(marker.shard)
        count(tally, marker)
        see(marker)
    for failure in ledger.failures(states.failed):
        count(tally, replace(failure, planned=plan.samples_of(failure.shard)))
    return tally, replace(states, committed=frozenset(committed))


def begin(
    plan: Planned, ledger: Ledger, part: tuple[int, int] | None, say: Callable[[str], None]
) -> tuple[Tally, States]:
    """The counts and states with which a run of these shards starts; failed shards are pending.

    ``say`` is called for each shard that is generated again because its marker cannot be read.
    """
    states = ledger.states(plan)
    listed = states if part is None else states.within(range(*part))
    tally, readable = take_stock(plan, ledger, replace(listed, failed=frozenset()))
    for shard in sorted(listed.committed - readable.committed):
        say(f"shard {shard} is generated again: its marker cannot be read")
    return tally, replace(readable, failed=listed.failed)


def count(tally: Tally, event: Marker | FailedMarker, made: bool = False) -> None:
    """Add a finished shard; ``made`` says that this run finished it."""
    if isinstance(event, FailedMarker):
        planned, accepted, rejected, failed = event.planned, 0, 0, event.planned
        tally.failed_shards += 1
        example = Example(f"shard {event.shard}", short(redact(event.message)))
        tally.note({event.error: planned}, {event.error: example})
    else:
        counts = event.counts
        planned, accepted = counts.planned, counts.accepted
        rejected, failed = counts.rejected, counts.failed
        tally.committed += 1
        tally.flawed_shards += failed > 0
        tally.truncated += event.truncated_prompts
        tally.note(event.reasons, event.examples)
    tally.accepted += accepted
    tally.rejected += rejected
    tally.failed += failed
    if made:
        tally.made += planned
        tally.accepted_now += accepted
        tally.rejected_now += rejected
        tally.failing_now += failed > 0
        tally.rejecting_now += rejected > 0
        tally.end_shard(event.shard)


def reasons_of(tally: Tally) -> tuple[Reason, ...]:
    """Why samples were rejected or failed, the most frequent first."""
    return tuple(
        Reason(reason, samples, tally.examples.get(reason))
        for reason, samples in sorted(tally.reasons.items(), key=lambda one: (-one[1], one[0]))
    )


def reason_lines(reasons: Sequence[Reason], url: str) -> list[str]:
    """The most frequent reasons, one line each, and the command that lists all samples."""
    lines = [_line(one) for one in reasons[:SHOWN_REASONS]]
    more = len(reasons) - SHOWN_REASONS
    others = f"  and {more} more reasons: " if more > 0 else "  all of them: "
    return [*lines, f"{others}`batchgen rejects {url}`"] if lines else []


def _line(one: Reason) -> str:
    said = f", e.g. {one.example.key}: {one.example.message}" if one.example else ""
    return f"  {one.count:,} {one.reason}{said}"


def hopeless(plan: Planned, tally: Tally) -> str:
    """Why the run should stop early; empty if it should continue.

    It stops if the failed fraction of the finished samples is above ``policy.failed_limit``, or if
    the rejected fraction of the samples that this run finished is above the middle between
    ``policy.rejected_limit`` and 1. Both need several shards with such samples, so that a single
    bad shard stops nothing.
    """
    policy, url = plan.spec.policy, plan.spec.output.url
    finished = tally.finished_samples
    if tally.failing_now >= MIN_BAD_SHARDS and tally.failed > policy.failed_limit * finished:
        return (
            f"{tally.failed:,} of the first {finished:,} samples failed, above "
            f"policy.failed_limit ({policy.failed_limit:g}); fix the cause, then run "
            f"`batchgen resume {url}`"
        )
    far = (1 + policy.rejected_limit) / 2
    if (
        plan.spec.quota is None  # whose budget is the limit
        and tally.rejecting_now >= MIN_BAD_SHARDS
        and tally.rejected_now >= MIN_REJECTS
        and tally.rejected_now > far * tally.made
        and tally.refused > policy.rejected_limit * finished
    ):
        return (
            f"{tally.rejected_now:,} of the {tally.made:,} samples that this run finished were "
            f"rejected, far above policy.rejected_limit ({policy.rejected_limit:g}); fix the "
            "input and write to a new output, or, if the remaining rows are better, continue with "
            f"`batchgen run {url}/_batchgen/job.yaml --set policy.rejected_limit=1`"
        )
    return ""


def survey(
    plan: Planned,
    ledger: Ledger,
    states: States,
    see: Callable[[Marker], None] = lambda marker: None,
) -> tuple[Tally, int, str]:
    """The counts, the exit code and the message, after a check for committed files that are lost.

    Each marker is read once, and ``see`` is called with it.

    Raises:
        PlanChanged: a marker belongs to another plan.
    """
    lost = LostFiles(ledger)

    def look(marker: Marker) -> None:
        lost.see(marker)
        see(marker)

    tally, readable = take_stock(plan, ledger, states, look)
    with suppress(InputError):  # rejects that cannot be read: all of them count
        again = replaced(ledger, plan, readable.committed)
        tally.rejected_again, tally.failed_again = again["rejected"], again["failed"]
    ending = damaged(ledger.store.url, lost.names) if lost.names else verdict(plan, tally)
    return tally, *ending


def verdict(plan: Planned, tally: Tally) -> tuple[int, str]:
    """The exit code and a sentence: 0 only when nothing is pending or failed."""
    url = plan.spec.output.url
    pending = tally.shards - tally.committed - tally.failed_shards
    if pending:
        return (
            3,
            f"{pending:,} of {tally.shards:,} shards are pending; "
            f"continue with `batchgen resume {url}`",
        )
    again = tally.rejected_again + tally.failed_again
    failed, samples = tally.failed - tally.failed_again, tally.samples - again
    if failed:
        remedy = (
            f"see {url}/_batchgen/failed, then `batchgen resume {url}`"
            if tally.failed_shards
            else "committed shards are not retried; to use other settings, write to a new output"
        )
        return 2, (
            f"{failed:,} of {samples:,} samples failed (in {tally.failed_shards:,} "
            f"failed shards and {tally.flawed_shards:,} committed ones); {remedy}"
        )
    limited = plan.spec.quota is None  # the budget of a quota is the limit
    if limited and tally.refused > plan.spec.policy.rejected_limit * samples:
        return 2, (
            f"{tally.refused:,} of {samples:,} samples were rejected, above "
            f"policy.rejected_limit ({plan.spec.policy.rejected_limit:g}); "
            f"{tally.accepted:,} images in {url}/data"
        )
    cut = f" ({tally.truncated:,} of them from truncated prompts, which were too long)"
    return (
        0,
        f"{tally.accepted:,} images in {url}/data{cut if tally.truncated else ''}, "
        f"{tally.rejected:,} samples rejected, {f'{tally.failed:,}' if tally.failed else 'none'} "
        f"failed{f'; {again:,} of these were made again' if again else ''}",
    )


def unchanged(outcome: Outcome) -> Outcome:
    """The outcome of a run that found no pending shard."""
    proof = f"`batchgen verify {outcome.output}` checks every file"
    return replace(outcome, message=f"nothing was pending: {outcome.message}; {proof}")


def advised(error: Interrupted, ledger: Ledger, planned: bool) -> Interrupted:
    """The error with advice on how to continue, if the output has a plan to continue."""
    with suppress(BatchgenError, OSError):
        planned = PLAN.rpartition("/")[2] in ledger.store.without_retries().list(RECORDS)
    if not planned:
        return error
    url = ledger.store.url
    return type(error)(f"{error}; committed shards are kept, continue with `batchgen resume {url}`")
