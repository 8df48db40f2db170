"""The main job: plan, find what is pending, stream it, finalize. Read this page first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

from batchgen import report
from batchgen.claim import claim, plan_to_keep
from batchgen.errors import BatchgenError, Interrupted, LimitExceeded, SpecError, VerifyFailed
from batchgen.holdings import refuse_to_remove, refuse_unless_free, remove_output
from batchgen.lease import LEASE_SECONDS, Lease, Part, hold_lease, part_text
from batchgen.ledger import PLAN, RECORDS, FailedMarker, Ledger, Marker, States
from batchgen.outcome import Outcome, count, hopeless, outcome_of, take_stock, tally_of, verdict_of
from batchgen.plain_text import plain, short
from batchgen.plan import Plan, make_plan
from batchgen.progress import Progress, Tally
from batchgen.replicas import ModelInfo, inspect
from batchgen.secrets import redact
from batchgen.spec import Spec
from batchgen.storage import absolute, configure, open_store

LOG_SECONDS = 30.0


def plan_job(spec: Spec) -> Plan:
    """What a run of this spec would make; writes nothing."""
    reach_stores(spec)
    return make_plan(anywhere(spec), inspect(spec.model, spec.task))


def run(
    spec: Spec,
    address: str | None = None,
    quiet: bool = False,
    shards: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Make what is planned and not yet committed, on local Ray or the cluster at ``address``.

    An output that holds a plan already is continued if the plan is still the same. ``shards``
    ("A:B": from A, up to but not with B) leaves the others to other runs, which may be at work on
    them at the same time. With ``overwrite`` what batchgen has made there is removed first.

    Raises:
        StopJob: usage errors (exit 1), an interruption (3).
    """
    return _run(spec, spec, address, quiet, shards, overwrite)


def _run(
    spec: Spec,
    asked: Spec,
    address: str | None,
    quiet: bool,
    shards: str | None,
    overwrite: bool = False,
) -> Outcome:
    """Run ``spec``; ``asked`` is what a later resume goes on with."""
    reach_stores(spec)
    ledger = Ledger(open_store(spec.output.url))
    spec, asked = anywhere(spec), anywhere(asked)
    planned = False
    try:
        refuse_unless_free(ledger) if not overwrite else refuse_to_remove(ledger, spec)
        saved = None if overwrite else plan_to_keep(ledger)
        plan = make_plan(spec, _inspect(spec, saved), check_keys=saved is None)
        part = part_of(plan, shards)
        say = _teller(quiet)
        with (
            interruptible() as interrupt,
            hold_lease(ledger.store, interrupt, part, say) as lease,
        ):
            ledger = Ledger(ledger.store.in_place())
            if overwrite:
                remove_output(ledger)
            told: list[str] = []
            plan = claim(ledger, plan, asked, told.append, whole=part is None)
            planned, lease.witness = True, PLAN
            if part is None:
                ledger.store.clear_temporary(older_than_s=LEASE_SECONDS)
            states = ledger.states(plan)
            listed = states if part is None else states.within(range(*part))
            stopped = ""
            tally, states = take_stock(plan, ledger, replace(listed, failed=frozenset()))
            states = replace(states, failed=listed.failed)  # they are tried again
            with Progress(tally, quiet) as progress, _kept(ledger, lease, progress):
                for shard in sorted(listed.committed - states.committed):
                    told.append(f"shard {shard} is made again: its marker cannot be read")
                for line in (*told, _opening(plan, states, tally.samples)):
                    progress.say(line)
                if states.pending:
                    stopped = _stream(plan, ledger, states, progress, address, lease, interrupt)
            outcome = finalize(plan, ledger, tally, part, stopped)
            lease.ending = outcome.message.replace(f"{ledger.store.url}/", "")  # it may be moved
            return outcome if states.pending or outcome.exit_code else _unchanged(outcome)
    except Interrupted as error:
        raise _advised(error, ledger, planned) from error


def _teller(quiet: bool) -> Callable[[str], None]:
    """Prints what is to be said before there is a progress display."""
    return (lambda words: None) if quiet else (lambda words: print(plain(words), file=sys.stderr))


def _unchanged(outcome: Outcome) -> Outcome:
    """Of a run that found nothing to do."""
    proof = f"`batchgen verify {outcome.output}` reads every file"
    return replace(outcome, message=f"nothing was pending: {outcome.message}; {proof}")


def _advised(error: Interrupted, ledger: Ledger, planned: bool) -> Interrupted:
    """The error with the way to go on, where there is something to go on with."""
    with suppress(BatchgenError, OSError):
        planned = PLAN.rpartition("/")[2] in ledger.store.impatient().list(RECORDS)
    if not planned:
        return error
    url = ledger.store.url
    return type(error)(f"{error}; what is committed stays, go on with `batchgen resume {url}`")


def part_of(plan: Plan, shards: str | None) -> Part | None:
    """The first shard and the one after the last, of "A:B", "A:" or ":B"; None for all.

    Raises:
        SpecError: not of this form, or not of this plan.
    """
    if shards is None:
        return None
    first, colon, stop = shards.partition(":")
    allowed = f"A:B with 0 <= A < B <= {plan.shards}, the shards of the plan"
    try:
        part = (int(first or 0), int(stop or plan.shards))
    except ValueError as error:
        raise SpecError("--shards", shards, allowed) from error
    if not colon or not 0 <= part[0] < part[1] <= plan.shards:
        raise SpecError("--shards", shards, allowed)
    return part


def resume(
    url: str,
    address: str | None = None,
    quiet: bool = False,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
    shards: str | None = None,
) -> Outcome:
    """Go on with the job that an output holds; its failed shards are tried again.

    Args:
        url: the output.
        address: a Ray cluster to join.
        quiet: no progress.
        storage_options: of stores, where they are not those of the first run.
        shards: "A:B", of them only.
    """
    given = {protocol: dict(options) for protocol, options in (storage_options or {}).items()}
    configure(given)
    ledger = Ledger(open_store(url))
    ledger.require_plan()
    spec = ledger.job()
    here = spec.output.model_copy(update={"url": url})  # wherever it was when it was planned
    asked = spec.model_copy(update={"output": here})
    options = {**spec.storage_options, **given}
    spec = asked.model_copy(update={"storage_options": options})
    return _run(spec, asked, address, quiet, shards)


def reach_stores(spec: Spec) -> None:
    """Stores are reached as the spec says from now on, in this process."""
    configure(spec.storage_options, spec.storage.limits())


def anywhere(spec: Spec) -> Spec:
    """The spec with local paths made absolute, for workers and for a resume from another folder."""
    path = absolute(spec.input.path) if spec.input.path else ""
    roots = spec.input.uri_roots
    if roots is not None:
        roots = tuple(root if root.endswith("://") else absolute(root) for root in roots)
    source = spec.input.model_copy(update={"path": path, "uri_roots": roots})
    output = spec.output.model_copy(update={"url": absolute(spec.output.url)})
    return spec.model_copy(update={"input": source, "output": output})


def _inspect(spec: Spec, saved: Plan | None) -> ModelInfo:
    """The model as it is now; a hub's model at the commit that was planned, if it moved on."""
    model = spec.model
    moves = model.revision is None and saved is not None and saved.spec.model == model
    if moves and saved and not saved.model.revision.startswith("sha256:"):
        model = model.model_copy(update={"revision": saved.model.revision})
    return inspect(model, spec.task)


@contextmanager
def _kept(ledger: Ledger, lease: Lease, progress: Progress) -> Iterator[None]:
    """What the run says is kept in its output: every LOG_SECONDS, and in the end how it ended."""
    over = threading.Event()

    def write(ending: str = "") -> None:
        if lease.gone:
            return
        with suppress(BatchgenError, OSError):  # the shards' own faults tell of the store
            ledger.log(lease.number, [*progress.said, progress.line(), *filter(None, [ending])])

    def keep() -> None:
        while not over.wait(LOG_SECONDS):
            write()

    thread = threading.Thread(target=keep, name="log", daemon=True)
    thread.start()
    ending = ""
    try:
        yield
    except KeyboardInterrupt:
        ending = "interrupted"
        raise
    except BaseException as error:
        ending = f"ended: {type(error).__name__}: {redact(str(error))}"
        raise
    finally:
        over.set()
        thread.join()
        write(ending)


def _stream(
    plan: Plan,
    ledger: Ledger,
    states: States,
    progress: Progress,
    address: str | None,
    lease: Lease,
    interrupt: Callable[[str], None],
) -> str:
    """Make the pending shards; says why, if that is stopped before the end as hopeless."""
    from batchgen import engine

    tally, stopped = progress.tally, ""
    progress.enter_phase(f"joining Ray at {address}" if address else "starting Ray")
    with engine.cluster(address) as joined:
        engine.refuse_hidden_gpu(plan.spec)
        pools = engine.pools_of(plan, len(states.pending))
        engine.await_room(pools, joined, progress.say)
        pools = engine.pools_of(plan, len(states.pending))  # with what has come meanwhile
        engine.refuse_unshared(_local_paths(plan, ledger))
        model = plan.model.model_id
        progress.enter_phase(f"loading {model} on {engine.described(pools)}")
        metrics = engine.Metrics(ledger.store.url)
        stream = engine.generate(plan, ledger, states.pending, pools, progress.hear)
        with engine.guarded(interrupt), engine.watched(pools, interrupt), closing(stream) as events:
            for event in events:
                count(tally, event, made=True)
                metrics.count(event)
                _say_of(event, progress)
                progress.show()
                if lease.lost.is_set():
                    raise Interrupted(lease.why_lost)
                if stopped := hopeless(plan, tally):
                    progress.say(f"stopped: {stopped}")
                    break
        tally.end()
        progress.say(tally.summary)
        progress.show()
    return stopped


def _say_of(event: Marker | FailedMarker, progress: Progress) -> None:
    if isinstance(event, FailedMarker):
        progress.say(f"shard {event.shard} failed: {event.error}: {short(redact(event.message))}")
    elif event.attempt > 1:
        progress.say(f"shard {event.shard} committed at attempt {event.attempt}")


def _local_paths(plan: Plan, ledger: Ledger) -> list[str]:
    """Of the input and the output, those that are files of a machine."""
    output = [ledger.store.path(PLAN)] if ledger.store.local else []
    return output + [file.path for file in plan.files[:1] if os.path.isabs(file.path)]


def finalize(
    plan: Plan, ledger: Ledger, tally: Tally, part: Part | None = None, stopped: str = ""
) -> Outcome:
    """Count from storage once more, write the card and the report, and say how it ended.

    Of the runs that each make a part, the one that ends last writes them, for the whole.
    ``stopped`` says why this run was stopped early, if it was.
    """
    states = ledger.states(plan)
    own = states if part is None else states.within(range(*part))
    counted = tally_of(plan, ledger, own)
    exit_code, message = verdict_of(plan, ledger, own, counted)
    if stopped and exit_code != VerifyFailed.exit_code:
        exit_code, message = LimitExceeded.exit_code, stopped
    if part is None:
        exit_code, message = report.write(plan, ledger, counted, exit_code, message)
    elif len(states.committed) + len(states.failed) < plan.shards:
        done = len(states.committed)
        message = f"shards {part_text(part)}: {message}; in all {done} of {plan.shards} committed"
    else:
        whole = tally_of(plan, ledger, states)
        report.write(plan, ledger, whole, *verdict_of(plan, ledger, states, whole))
        message = f"shards {part_text(part)}: {message}; none is pending elsewhere"
    return outcome_of(counted, tally, ledger.store.url, exit_code, message)


def _opening(plan: Plan, states: States, samples: int) -> str:
    made = f", {len(states.committed):,} of them committed already" if states.committed else ""
    again = f", {len(states.failed):,} failed ones tried again" if states.failed else ""
    spec = plan.spec
    return (
        f"{samples:,} samples in {len(states.numbers):,} shards{made}{again}: {spec.task} with "
        f"{plan.model.model_id}, {plan.model.scheduler}, "
        f"{spec.sampling.num_inference_steps} steps, batch {spec.resources.batch_size}, "
        f"{spec.resources.layout}"
    )


@contextmanager
def interruptible() -> Iterator[Callable[[str], None]]:
    """Inside, Ctrl-C, SIGTERM and the yielded function end the run as ``Interrupted``.

    The function does so once: several watchdogs may call it, and the second signal would find a run
    that is ending, or a process without a handler, which it would kill without a word.
    """
    why: list[str] = []
    over = threading.Event()
    turn = threading.Lock()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt  # an Exception would be caught, and logged, inside Ray

    def interrupt(reason: str) -> None:
        with turn:
            if why or over.is_set():
                return
            why.append(reason)
            if not previous:
                return  # the caller owns the signals, and the stream looks at the lease
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # while Ray ends, SIGTERM has no handler

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
    except ValueError:
        pass  # not in the main thread: the caller owns the signals
    try:
        yield interrupt
    except KeyboardInterrupt as error:
        raise Interrupted(*(why or ["interrupted"])) from error
    finally:
        over.set()
        with turn:
            for number, handler in previous.items():
                signal.signal(number, handler)
