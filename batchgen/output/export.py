"""Writes a finished output in another format, with the same samples and image bytes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from batchgen.errors import Interrupted, PlanChanged, SpecError
from batchgen.output.commit import commit_shard
from batchgen.output.finished import proven, refuse_nested, refuse_unfinished, refuse_unless_empty
from batchgen.output.formats import FORMATS
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import JOB, Ledger
from batchgen.output.marker import Marker
from batchgen.output.proof import Prover
from batchgen.output.restrict import Chosen, restricted
from batchgen.output.verify import exporting
from batchgen.plan.parts import Parts
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.spec.spec import Spec
from batchgen.storage import Store

SELECTED = "_batchgen/selected"  # digest of the selection that a copy has
_THREADS = 4  # each holds one shard


def export(source: Ledger, target: Store, format: str, chosen: Chosen | None = None) -> int:
    """Write the output at ``source`` to ``target`` in another format.

    With ``chosen``, the copy has only these samples, and lists the others as rejected.

    The target gets its own plan, markers and rejects, so that ``verify`` can prove it. An
    interrupted export continues where it stopped.

    Returns:
        The number of shards that were written now.

    Raises:
        SpecError: there is no such format.
        InputError: the source is not finished, is damaged or does not match its plan; the target
            has other files, or one of the two is inside the other.
        PlanChanged: the target is an output of another plan, or a copy of another selection.
        OutputBusy, Interrupted: another process writes to the target.
    """
    if format not in FORMATS:
        raise SpecError("output.format", format, ", ".join(FORMATS))
    parts = source.parts()
    refuse_unfinished(source, parts, then="export")
    refuse_nested(source, target)
    exported = _exported(parts, target, format, chosen)
    ledger = Ledger(target)
    with hold_lease(target, lambda reason: None) as lease:
        exported = _prepare(source, ledger, exported, chosen)
        pending = ledger.states(exported).pending
        for _ in _each(source, parts, ledger, exported, pending, chosen):
            if lease.lost.is_set():
                raise Interrupted("another run has taken over the lease of the target")
    return len(pending)


def _exported(parts: Parts, target: Store, format: str, chosen: Chosen | None) -> Parts:
    """The parts of the copy; each continues the one before it, as in the source."""
    made: list[Plan] = []
    for plan in parts:
        place = replace(plan.place, before=made[-1].fingerprint) if made else plan.place
        spec = _moved(plan.spec, target, format, chosen)
        made.append(replace(plan, spec=spec, frozen=None, place=place))
    return Parts(made)


def _moved(spec: Spec, target: Store, format: str, chosen: Chosen | None) -> Spec:
    output = spec.output.model_copy(update={"url": target.url, "format": format})
    policy = spec.policy
    if chosen is not None:  # what is not selected is rejected on purpose
        policy = policy.model_copy(update={"rejected_limit": 1.0})
    return spec.model_copy(update={"output": output, "policy": policy})


def _prepare(source: Ledger, ledger: Ledger, exported: Parts, chosen: Chosen | None) -> Parts:
    """Freeze the parts in an empty target, or check that the target's are the same.

    A target whose source was extended since gets the further parts.
    """
    job = _moved(source.job(), ledger.store, exported.spec.output.format, chosen)
    if ledger.plan() is None:
        refuse_unless_empty(ledger.store, (SELECTED,))
        if chosen is not None:
            ledger.store.put(SELECTED, chosen.digest.encode())
        ledger.freeze(exported[0], job)
    known = ledger.parts()
    same = [compare(saved, plan) for saved, plan in zip(known, exported, strict=False)]
    if _selected(ledger) != (chosen and chosen.digest):
        raise PlanChanged(
            f"target {ledger.store.url} is a copy of other samples of the source, or of all; "
            "repeat its selection, or choose an empty folder"
        )
    ledger.store.put(JOB, job.to_yaml().encode())  # the last export may have ended before this
    for plan in exported[len(known) :]:
        ledger.add_part(plan)
    return Parts([*same, *exported[len(known) :]])


def _selected(ledger: Ledger) -> str | None:
    """The digest of the selection that an output is a copy of; None if of all samples."""
    try:
        return ledger.store.read(SELECTED).decode()
    except FileNotFoundError:
        return None


def _each(
    source: Ledger,
    parts: Parts,
    ledger: Ledger,
    exported: Parts,
    shards: list[int],
    chosen: Chosen | None,
) -> Iterator[Marker]:
    """Export the shards, several at a time; the first error ends the export."""
    provers = exporting(source, parts)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="export")
    try:
        yield from pool.map(
            lambda shard: _shard(provers.of(shard), ledger, exported.of(shard), shard, chosen),
            shards,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _shard(
    prover: Prover, ledger: Ledger, exported: Plan, shard: int, chosen: Chosen | None
) -> Marker:
    """Export one shard: data files in the new format, its rejects, then the marker."""
    found = proven(prover, shard)
    if chosen is not None:
        found = restricted(found, chosen)
    moved = replace(
        found.marker,
        spec_fingerprint=exported.fingerprints.spec,
        plan_fingerprint=exported.fingerprint,
    )
    return commit_shard(ledger, exported, moved, found.table, found.rejects)
