"""The main job: plan, find what is pending, stream it, finalize. Read this page first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from batchgen.curate.rounds import check_rounds, in_rounds
from batchgen.engine.follow import follow
from batchgen.engine.interrupt import interruptible
from batchgen.engine.planning import plan_for, runnable
from batchgen.errors import Interrupted
from batchgen.output.claim import choices_ahead, claim, job_of, plan_to_keep
from batchgen.output.holdings import refuse_to_remove, refuse_unless_free, remove_output
from batchgen.output.lease import LEASE_SECONDS, Lease, hold_lease
from batchgen.output.ledger import PLAN, Ledger, States
from batchgen.output.outcome import Outcome, advised, begin, hopeless, unchanged
from batchgen.output.shard_range import parse_range
from batchgen.plan.plan import Plan
from batchgen.plan.sizes import resized
from batchgen.progress.display import Progress
from batchgen.progress.lines import opening, teller
from batchgen.progress.log import kept
from batchgen.report.finalize import finalize
from batchgen.spec.places import anywhere, reach_stores
from batchgen.spec.spec import Spec
from batchgen.storage import configure, open_store


def plan_job(spec: Spec, address: str | None = None) -> Plan:
    """The plan of a run of this spec, on local Ray or a cluster at ``address``; writes nothing."""
    reach_stores(spec)
    plan = plan_for(choices_ahead(anywhere(spec)), address)[0]
    return check_rounds(plan, Ledger(open_store(plan.spec.output.url).without_retries()))


def run(
    spec: Spec,
    address: str | None = None,
    quiet: bool = False,
    shards: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Generate all planned shards that are not committed, on local Ray or a cluster at ``address``.

    An output with the same plan is continued. ``shards`` ("A:B" means A to B-1) limits the run to
    these; other runs can generate the others meanwhile. ``overwrite`` first removes earlier output.
    Raises StopJob: usage errors (exit 1), an interruption (exit 3).
    """
    make = partial(_run, spec, spec, address, quiet)
    return in_rounds(spec, make, shards, overwrite, say=teller(quiet))


def _run(
    spec: Spec,
    asked: Spec,
    address: str | None,
    quiet: bool,
    shards: str | None = None,
    overwrite: bool = False,
    planned: Spec | None = None,
) -> Outcome:
    """Run ``spec``. ``asked`` is saved for a resume; ``planned`` has the plan's sizes of calls."""
    reach_stores(spec)
    ledger, has_plan = Ledger(open_store(spec.output.url)), False
    spec, asked = anywhere(spec), anywhere(asked)
    try:
        refuse_unless_free(ledger) if not overwrite else refuse_to_remove(ledger, spec)
        saved = None if overwrite else plan_to_keep(ledger, whole=shards is None)
        plan, sizes = plan_for(spec, address, saved, planned)
        check_rounds(plan, None if overwrite else ledger)
        part = parse_range(shards, ledger.parts().shards if saved else plan.shards)
        with (
            interruptible() as interrupt,
            hold_lease(ledger.store, interrupt, part, teller(quiet)) as lease,
        ):
            ledger = Ledger(ledger.store.in_place())
            if overwrite:
                remove_output(ledger, spec.input.path)
            told = list(plan.notes)
            parts = claim(ledger, plan, asked, told.append, whole=part is None)
            has_plan, lease.witness, stopped = True, PLAN, ""
            if part is None:
                ledger.store.clear_temporary(older_than_s=LEASE_SECONDS)
            tally, states = begin(parts, ledger, part, told.append)
            todo = runnable(parts, sizes, spec, address, planned, states.pending)
            first = todo[0] if todo else resized(parts[0], sizes)
            with Progress(tally, quiet) as progress, kept(ledger, lease, progress):
                for line in (*told, opening(first, states, tally.samples)):
                    progress.say(line)
                for one in todo:
                    own = states.within(one.numbers)
                    if stopped := _stream(one, ledger, own, progress, address, lease, interrupt):
                        break
            outcome = finalize(parts, ledger, tally, part, stopped)
            lease.ending = outcome.message.replace(f"{ledger.store.url}/", "")  # it may be moved
            return outcome if states.pending or outcome.exit_code else unchanged(outcome)
    except Interrupted as error:
        raise advised(error, ledger, has_plan) from error


def resume(
    url: str,
    address: str | None = None,
    quiet: bool = False,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
    shards: str | None = None,
    batch_size: int | None = None,
    decode_batch_size: int | None = None,
) -> Outcome:
    """Continue the job of the output at ``url``; its failed shards are retried.

    ``storage_options`` are those that differ from the first run's. ``batch_size`` and
    ``decode_batch_size`` are smaller sizes for the shards that are left. The rest is as in ``run``.
    """
    configure(storage_options or {})
    planned, asked = job_of(Ledger(open_store(url)), batch_size, decode_batch_size)
    options = {**asked.storage_options, **(storage_options or {})}
    spec = asked.model_copy(update={"storage_options": options})
    make = partial(_run, spec, asked, address, quiet, planned=planned)
    return in_rounds(spec, make, shards, say=teller(quiet))


def _stream(
    plan: Plan,
    ledger: Ledger,
    states: States,
    progress: Progress,
    address: str | None,
    lease: Lease,
    interrupt: Callable[[str], None],
) -> str:
    """Generate the pending shards; returns why the run stopped early, or an empty string."""
    from batchgen.engine.start import ready
    from batchgen.engine.stream import generate

    pending = states.pending
    with ready(plan, ledger, len(pending), address, progress, interrupt) as pools:
        stream = generate(plan, ledger, pending, pools, progress.hear)
        stopped = follow(stream, progress, lease, partial(hopeless, plan))
        progress.end()
    return stopped
