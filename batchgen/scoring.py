"""The job of `score`: settle the scorers, find what is not scored, stream it, count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batchgen.curate.score_request import Request, settled
from batchgen.curate.score_sets import shards_of
from batchgen.curate.summary import show_scores
from batchgen.engine.follow import follow
from batchgen.engine.interrupt import interruptible
from batchgen.errors import InputError, Interrupted, LimitExceeded
from batchgen.output.lease import Lease, hold_lease
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.outcome import Outcome, count, outcome_of
from batchgen.output.score_set import (
    RECORD,
    ScoreSet,
    claim_set,
    files_of,
    folder_of,
    lease_folder,
    ledger_of,
    withdraw,
)
from batchgen.output.shard_range import ShardRange, parse_range, range_text
from batchgen.output.tally import Tally
from batchgen.plan.plan import Plan
from batchgen.progress.display import Progress
from batchgen.progress.lines import teller
from batchgen.progress.log import kept
from batchgen.spec.places import reach_stores
from batchgen.spec.score_section import ScorerSpec
from batchgen.spec.sections import Pool, Resources
from batchgen.storage import configure, open_store

BAD_SHARDS = 3  # more shards with unscored samples than an accident makes
Shards = Sequence[tuple[Plan, Marker]]


@dataclass(frozen=True)
class _Job:
    """A run on a score set: its output, the frozen record, and the plan with its resources."""

    ledger: Ledger
    record: ScoreSet
    specs: tuple[ScorerSpec, ...]
    plan: Plan
    address: str | None

    @property
    def own(self) -> Ledger:
        return ledger_of(self.ledger, self.record.name)


def score(
    url: str,
    asked: Request,
    address: str | None = None,
    quiet: bool = False,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Score all committed shards of the output at ``url`` that the set has no scores of.

    Raises:
        StopJob: usage errors (exit 1), an interruption (exit 3).
    """
    configure(storage_options or {})
    ledger = Ledger(open_store(url))
    parts = ledger.parts()
    spec = ledger.job()
    options = {**spec.storage_options, **(storage_options or {})}
    reach_stores(spec.model_copy(update={"storage_options": options}))
    record, specs = settled(ledger, asked, parts)
    part = parse_range(asked.shards, parts.shards)
    plan = _plan(parts[0], specs, asked.pool, options)
    name = record.name
    try:
        with (
            interruptible() as interrupt,
            hold_lease(ledger.store, interrupt, part, teller(quiet), lease_folder(name)) as lease,
        ):
            ledger = Ledger(ledger.store.in_place())
            job = _Job(ledger, claim_set(ledger, record), specs, plan, address)
            lease.witness = f"{folder_of(name)}/{RECORD}"
            told = list[str]()
            tally, pending = _begin(job, part, told.append)
            stopped = ""
            with Progress(tally, quiet) as progress, kept(job.own, lease, progress):
                progress.doing = "scoring"
                for line in (*told, _opening(job, tally)):
                    progress.say(line)
                if pending:
                    stopped = _stream(job, pending, progress, lease, interrupt)
            outcome = _outcome(job, part, tally, stopped)
            outcome = _reported(ledger, outcome)
            lease.ending = outcome.message.replace(f"{ledger.store.url}/", "")
            return outcome
    except Interrupted as error:
        again = f"`batchgen score {ledger.store.url} --name {name}`"
        raise type(error)(f"{error}; scores are kept, continue with {again}") from error


def _plan(
    plan: Plan,
    specs: Sequence[ScorerSpec],
    pool: Pool,
    options: dict[str, Mapping[str, Any]],
) -> Plan:
    """The plan with the resources of scoring: GPUs only for scorers that have a model."""
    if pool.num_gpus is None and not any(one.model or one.is_own for one in specs):
        pool = pool.model_copy(update={"num_gpus": 0.0})
    size = max((one.batch_size for one in specs), default=1)
    resources = Resources(generate=pool, batch_size=size)
    spec = plan.spec.model_copy(update={"resources": resources, "storage_options": options})
    return replace(plan, spec=spec).without_files()


def _begin(
    job: _Job, part: ShardRange | None, say: Callable[[str], None]
) -> tuple[Tally, list[tuple[Plan, Marker]]]:
    """The counts so far and the shards to score; scores of changed shards are withdrawn."""
    shards = _within(job.ledger, part)
    files = files_of(job.ledger, job.record.name)
    done = {marker.shard for _, marker in shards if files.has(marker)}
    scored = {one.shard: one for one in job.own.markers(done)}
    tally = Tally(len(shards), sum(marker.counts.accepted for _, marker in shards))
    for one in scored.values():
        count(tally, one)
    pending = [(plan, marker) for plan, marker in shards if marker.shard not in scored]
    for _, marker in pending:
        if marker.shard in files.marked:
            say(f"shard {marker.shard} is scored again: it changed, or its marker cannot be read")
        if marker.shard in files.marked or marker.shard in files.by_shard:
            withdraw(job.ledger, files, marker.shard)
    return tally, pending


def _within(ledger: Ledger, part: ShardRange | None) -> list[tuple[Plan, Marker]]:
    numbers = None if part is None else range(*part)
    return [one for one in shards_of(ledger) if numbers is None or one[1].shard in numbers]


def _opening(job: _Job, tally: Tally) -> str:
    already = f", {tally.committed:,} of them already scored" if tally.committed else ""
    return (
        f"{tally.samples:,} images in {tally.shards:,} shards{already}: "
        f"{', '.join(one.title for one in job.specs)} -> score set {job.record.name}"
    )


def _stream(
    job: _Job,
    pending: Shards,
    progress: Progress,
    lease: Lease,
    interrupt: Callable[[str], None],
) -> str:
    """Score the pending shards; returns why the run stopped early, or an empty string."""
    from batchgen.engine.score import ScoreJob, score_pools, score_stream

    asked = ScoreJob(job.plan, job.ledger.store.url, time.time(), job.record, job.specs)
    start = score_pools(job.plan, job.ledger, len(pending), job.address, progress, interrupt)
    with start as pools:
        stream = score_stream(asked, pending, pools, progress.hear)
        stopped = follow(stream, progress, lease, partial(_hopeless, job))
        progress.end()
    return stopped


def _hopeless(job: _Job, tally: Tally) -> str:
    """Why the run should stop early; empty if it should continue."""
    finished, limit = tally.finished_samples, job.plan.spec.policy.failed_limit
    if tally.failing_now < BAD_SHARDS or tally.failed <= limit * finished:
        return ""
    return (
        f"{tally.failed:,} of the first {finished:,} images could not be scored, above "
        f"policy.failed_limit ({limit:g}); fix the cause, then score again"
    )


def _outcome(job: _Job, part: ShardRange | None, run: Tally, stopped: str) -> Outcome:
    """Count from storage once more: 0 only when nothing is pending or failed."""
    ledger, own = job.ledger, job.own
    shards = _within(ledger, part)
    files = files_of(ledger, job.record.name)
    tally = Tally(len(shards), sum(marker.counts.accepted for _, marker in shards))
    for marker in own.markers({one.shard for _, one in shards if files.has(one)}):
        count(tally, marker)
    known = {one.shard: one for _, one in shards}
    failed = own.states_of(range(max(known, default=0) + 1)).failed & known.keys()
    for failure in own.failures(failed):
        count(tally, replace(failure, planned=known[failure.shard].counts.accepted))
    unmade = sum(len(ledger.states(plan).pending) for plan in ledger.parts()) if not part else 0
    code, message = (LimitExceeded.exit_code, stopped) if stopped else _verdict(job, tally, unmade)
    if part is not None:
        message = f"shards {range_text(part)}: {message}"
    return outcome_of(tally, run, ledger.store.url, code, message)


def _reported(ledger: Ledger, outcome: Outcome) -> Outcome:
    """Put the scores into the report; without DuckDB the outcome says that they are not there."""
    if not outcome.images_made:
        return outcome
    try:
        show_scores(ledger)
    except InputError as error:
        return replace(outcome, message=f"{outcome.message}; not in the report: {error}")
    return outcome


def _verdict(job: _Job, tally: Tally, unmade: int) -> tuple[int, str]:
    url, name = job.ledger.store.url, job.record.name
    again = f"`batchgen score {url} --name {name}`"
    pending = tally.shards - tally.committed - tally.failed_shards
    if pending:
        return 3, f"{pending:,} of {tally.shards:,} shards are not scored; continue with {again}"
    if tally.failed_shards:
        where = f"{url}/{folder_of(name)}/failed"
        return 2, f"{tally.failed_shards:,} shards could not be scored; see {where}, then {again}"
    scored = f"{tally.accepted:,} images scored in {url}/{folder_of(name)}"
    if tally.failed:
        return 2, f"{scored}; {tally.failed:,} could not be scored and have no scores"
    if unmade:
        resume = f"`batchgen resume {url}`"
        return 3, f"{scored}; {unmade:,} shards of the output are pending: {resume}, then {again}"
    return 0, f"{scored}: columns {', '.join(one.name for one in job.record.columns)}"
