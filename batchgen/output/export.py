"""Writes a finished output in another format, with the same samples and image bytes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from batchgen.errors import Interrupted, SpecError
from batchgen.output.commit import commit_shard
from batchgen.output.finished import proven, refuse_nested, refuse_unfinished, refuse_unless_empty
from batchgen.output.formats import FORMATS
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import JOB, Ledger, Marker
from batchgen.output.proof import Prover
from batchgen.output.verify import prover_of
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.spec.spec import Spec
from batchgen.storage import Store

_THREADS = 4  # each holds one shard


def export(source: Ledger, target: Store, format: str) -> int:
    """Write the output at ``source`` to ``target`` in another format.

    The target gets its own plan, markers and rejects, so that ``verify`` can prove it. An
    interrupted export continues where it stopped.

    Returns:
        The number of shards that were written now.

    Raises:
        SpecError: there is no such format.
        InputError: the source is not finished, is damaged or does not match its plan; the target
            has other files, or one of the two is inside the other.
        PlanChanged: the target is an output of another plan.
        OutputBusy, Interrupted: another process writes to the target.
    """
    if format not in FORMATS:
        raise SpecError("output.format", format, ", ".join(FORMATS))
    plan = source.require_plan()
    refuse_unfinished(source, plan, then="export")
    refuse_nested(source, target)
    exported = replace(plan, spec=_moved(plan.spec, target, format), frozen=None)
    ledger = Ledger(target)
    with hold_lease(target, lambda reason: None) as lease:
        exported = _prepare(source, ledger, exported)
        pending = ledger.states(exported).pending
        for _ in _each(source, plan, ledger, exported, pending):
            if lease.lost.is_set():
                raise Interrupted("another run has taken over the lease of the target")
    return len(pending)


def _moved(spec: Spec, target: Store, format: str) -> Spec:
    output = spec.output.model_copy(update={"url": target.url, "format": format})
    return spec.model_copy(update={"output": output})


def _prepare(source: Ledger, ledger: Ledger, exported: Plan) -> Plan:
    """Freeze the plan in an empty target, or check that the target's plan is the same."""
    job = _moved(source.job(), ledger.store, exported.spec.output.format)
    saved = ledger.plan()
    if saved is None:
        refuse_unless_empty(ledger.store)
        ledger.freeze(exported, job)
        return exported
    exported = compare(saved, exported)
    ledger.store.put(JOB, job.to_yaml().encode())  # the last export may have ended before this
    return exported


def _each(
    source: Ledger, plan: Plan, ledger: Ledger, exported: Plan, shards: list[int]
) -> Iterator[Marker]:
    """Export the shards, several at a time; the first error ends the export."""
    prover = prover_of(source, plan)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="export")
    try:
        yield from pool.map(lambda shard: _shard(prover, ledger, exported, shard), shards)
    finally:
        pool.shutdown(cancel_futures=True)


def _shard(prover: Prover, ledger: Ledger, exported: Plan, shard: int) -> Marker:
    """Export one shard: data files in the new format, unchanged rejects, then the marker."""
    found = proven(prover, shard)
    moved = replace(
        found.marker,
        spec_fingerprint=exported.fingerprints.spec,
        plan_fingerprint=exported.fingerprint,
    )
    return commit_shard(ledger, exported, moved, found.table, found.rejects)
