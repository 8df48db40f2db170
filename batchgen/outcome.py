"""How a run stands and how it ended: counts from markers, the verdict, and what stops it early."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchgen.errors import LimitExceeded
from batchgen.ledger import FailedMarker, Ledger, Marker, States
from batchgen.plan import Plan
from batchgen.progress import Tally
from batchgen.verify import damaged, lost_files

MIN_BAD_SHARDS = 3


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in numbers that ``verify`` can prove."""

    output: str
    shards: int
    planned: int
    committed: int
    failed_shards: int
    pending: int
    accepted: int
    rejected: int
    failed: int
    images_per_second: float
    exit_code: int
    message: str


def tally_of(plan: Plan, ledger: Ledger, states: States) -> Tally:
    """The counts so far, from markers; what has none that can be read is pending.

    Raises:
        PlanChanged: a marker was made for another plan.
    """
    return take_stock(plan, ledger, states)[0]


def take_stock(plan: Plan, ledger: Ledger, states: States) -> tuple[Tally, States]:
    """The counts so far, and the states without those markers that cannot be read."""
    first, stop = states.numbers.start, states.numbers.stop
    samples = plan.sample_range(stop - 1)[1] - plan.sample_range(first)[0]
    tally = Tally(len(states.numbers), samples)
    committed = set()
    for marker in ledger.markers(states.committed):
        if not marker.is_of(plan):
            raise ledger.foreign(marker.shard)
        committed.add(marker.shard)
        count(tally, marker)
    for failure in ledger.failures(states.failed):
        count(tally, replace(failure, planned=plan.samples_of(failure.shard)))
    return tally, replace(states, committed=frozenset(committed))


def count(tally: Tally, event: Marker | FailedMarker, made: bool = False) -> None:
    if isinstance(event, FailedMarker):
        planned = event.planned
        bad = True
        tally.failed_shards += 1
        tally.failed += planned
    else:
        planned = event.counts.planned
        tally.committed += 1
        bad = event.counts.failed > 0
        tally.flawed_shards += bad
        tally.accepted += event.counts.accepted
        tally.rejected += event.counts.rejected
        tally.failed += event.counts.failed
    if made:
        tally.failures_now += bad
        tally.add_made(planned)


def stop_when_hopeless(plan: Plan, tally: Tally) -> None:
    limit, url = plan.spec.policy.failed_limit, plan.spec.output.url
    if tally.failures_now >= MIN_BAD_SHARDS and tally.failed > limit * tally.finished_samples:
        raise LimitExceeded(
            f"{tally.failed} of the first {tally.finished_samples} samples failed, above "
            f"policy.failed_limit ({limit:g}); the reasons stand in {url}/_batchgen/failed and "
            f"rejects; mend the cause, then `batchgen resume {url}`"
        )


def verdict_of(plan: Plan, ledger: Ledger, states: States, tally: Tally) -> tuple[int, str]:
    """How it stands, with a look for files that are lost since they were committed."""
    lost = lost_files(ledger, states.committed)
    return damaged(ledger.store.url, lost) if lost else verdict(plan, tally)


def verdict(plan: Plan, tally: Tally) -> tuple[int, str]:
    """The exit code and a sentence: 0 only when nothing is pending or failed."""
    url = plan.spec.output.url
    pending = tally.shards - tally.committed - tally.failed_shards
    if pending:
        return (
            3,
            f"{pending} of {tally.shards} shards are pending; go on with `batchgen resume {url}`",
        )
    if tally.failed:
        remedy = (
            f"see {url}/_batchgen/failed, then `batchgen resume {url}`"
            if tally.failed_shards
            else f"see {url}/_batchgen/rejects; other settings need a new output"
        )
        return 2, (
            f"{tally.failed} of {tally.samples} samples failed (in {tally.failed_shards} failed "
            f"shards and {tally.flawed_shards} committed ones); {remedy}"
        )
    if tally.rejected > plan.spec.policy.rejected_limit * tally.samples:
        return 2, (
            f"{tally.rejected} of {tally.samples} samples were rejected, above "
            f"policy.rejected_limit ({plan.spec.policy.rejected_limit:g}); "
            f"the reasons stand in {url}/_batchgen/rejects"
        )
    return (
        0,
        f"{tally.accepted} images in {url}/data, {tally.rejected} samples rejected, none failed",
    )
