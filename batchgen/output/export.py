"""Writes a finished output in another format, with the same samples and image bytes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from batchgen.errors import InputError, Interrupted, PlanChanged, SpecError
from batchgen.output.commit import commit_shard
from batchgen.output.finished import proven, refuse_nested, refuse_unfinished, refuse_unless_empty
from batchgen.output.formats import FORMATS
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import JOB, Ledger
from batchgen.output.marker import Marker
from batchgen.output.planned import columns_of
from batchgen.output.proof import Prover
from batchgen.output.restrict import Chosen, restricted
from batchgen.output.sign import UNSIGNED, ImageSigner
from batchgen.output.verify import exporting
from batchgen.plan.parts import Parts
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.spec.spec import Spec
from batchgen.storage import Store

SIGNED = "_batchgen/signed"  # SHA-256 of the certificate that signed the images of a copy
SELECTED = "_batchgen/selected"  # digest of the selection that a copy has
_THREADS = 4  # each holds one shard


@dataclass(frozen=True)
class Copy:
    """What a copy has that its source has not: a format, fewer samples, and signatures.

    Attributes:
        format: of the data files.
        chosen: the copy has only these samples, and lists the others as rejected.
        signer: signs each image; None for the images as they are.
    """

    format: str
    chosen: Chosen | None = None
    signer: ImageSigner | None = None

    def spec(self, spec: Spec, target: Store) -> Spec:
        """The spec of the copy."""
        changes: dict[str, object] = {"url": target.url, "format": self.format}
        if self.signer is not None:
            changes["signed"] = True
        policy = spec.policy
        if self.chosen is not None:  # what is not selected is rejected on purpose
            policy = policy.model_copy(update={"rejected_limit": 1.0})
        output = spec.output.model_copy(update=changes)
        return spec.model_copy(update={"output": output, "policy": policy})


def export(
    source: Ledger,
    target: Store,
    format: str,
    chosen: Chosen | None = None,
    signer: ImageSigner | None = None,
) -> int:
    """Write the output at ``source`` to ``target`` in another format.

    With ``chosen``, the copy has only these samples, and lists the others as rejected. With
    ``signer``, its images are signed, so that their bytes differ from those of the source.

    The target gets its own plan, markers and rejects, so that ``verify`` can prove it. An
    interrupted export continues where it stopped.

    Returns:
        The number of shards that were written now.

    Raises:
        SpecError: there is no such format.
        InputError: the source is not finished, is damaged or does not match its plan; the target
            has other files, or one of the two is inside the other; it is signed already.
        PlanChanged: the target is an output of another plan, a copy of another selection, or
            signed with another certificate.
        OutputBusy, Interrupted: another process writes to the target.
    """
    if format not in FORMATS:
        raise SpecError("output.format", format, ", ".join(FORMATS))
    parts = source.parts()
    refuse_unfinished(source, parts, then="export")
    refuse_nested(source, target)
    copy = Copy(format, chosen, signer)
    if signer is not None:
        _refuse_signed(source, parts)
    exported = _exported(parts, target, copy)
    ledger = Ledger(target)
    with hold_lease(target, lambda reason: None) as lease:
        exported = _prepare(source, ledger, exported, copy)
        pending = ledger.states(exported).pending
        for _ in _each(source, parts, ledger, exported, pending, copy):
            if lease.lost.is_set():
                raise Interrupted("another run has taken over the lease of the target")
    return len(pending)


def _refuse_signed(source: Ledger, parts: Parts) -> None:
    """A signature of a signed image would be of other bytes than those that a run made."""
    if any(UNSIGNED in columns_of(plan) for plan in parts):
        raise InputError(
            f"source {source.store.url} has a column {UNSIGNED!r} already: its images are signed, "
            "or the input has a column of that name; export the first output, or leave the column "
            "out (input.keep_columns)"
        )


def _exported(parts: Parts, target: Store, copy: Copy) -> Parts:
    """The parts of the copy; each continues the one before it, as in the source."""
    made: list[Plan] = []
    for plan in parts:
        place = replace(plan.place, before=made[-1].fingerprint) if made else plan.place
        made.append(replace(plan, spec=copy.spec(plan.spec, target), frozen=None, place=place))
    return Parts(made)


def _prepare(source: Ledger, ledger: Ledger, exported: Parts, copy: Copy) -> Parts:
    """Freeze the parts in an empty target, or check that the target's are the same.

    A target whose source was extended since gets the further parts.
    """
    chosen, signer = copy.chosen, copy.signer
    job = copy.spec(source.job(), ledger.store)
    if ledger.plan() is None:
        refuse_unless_empty(ledger.store, (SELECTED, SIGNED))
        if signer is not None:
            ledger.store.put(SIGNED, signer.certificate_sha256.encode())
        if chosen is not None:
            ledger.store.put(SELECTED, chosen.digest.encode())
        ledger.freeze(exported[0], job)
    known = ledger.parts()
    if _recorded(ledger, SIGNED) != (signer and signer.certificate_sha256):
        raise PlanChanged(
            f"target {ledger.store.url} is signed with another certificate, or only one of both "
            "exports signs; repeat its export, or choose an empty folder"
        )
    same = [compare(saved, plan) for saved, plan in zip(known, exported, strict=False)]
    if _recorded(ledger, SELECTED) != (chosen and chosen.digest):
        raise PlanChanged(
            f"target {ledger.store.url} is a copy of other samples of the source, or of all; "
            "repeat its selection, or choose an empty folder"
        )
    ledger.store.put(JOB, job.to_yaml().encode())  # the last export may have ended before this
    for plan in exported[len(known) :]:
        ledger.add_part(plan)
    return Parts([*same, *exported[len(known) :]])


def _recorded(ledger: Ledger, name: str) -> str | None:
    """The digest that a copy records about itself; None if there is no such record."""
    try:
        return ledger.store.read(name).decode()
    except FileNotFoundError:
        return None


def _each(
    source: Ledger,
    parts: Parts,
    ledger: Ledger,
    exported: Parts,
    shards: list[int],
    copy: Copy,
) -> Iterator[Marker]:
    """Export the shards, several at a time; the first error ends the export."""
    provers = exporting(source, parts)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="export")
    try:
        yield from pool.map(
            lambda shard: _shard(provers.of(shard), ledger, exported.of(shard), shard, copy),
            shards,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _shard(prover: Prover, ledger: Ledger, exported: Plan, shard: int, copy: Copy) -> Marker:
    """Export one shard: data files in the new format, its rejects, then the marker."""
    found = proven(prover, shard)
    if copy.chosen is not None:
        found = restricted(found, copy.chosen)
    table = found.table if copy.signer is None else copy.signer.table(found.table)
    moved = replace(
        found.marker,
        spec_fingerprint=exported.fingerprints.spec,
        plan_fingerprint=exported.fingerprint,
    )
    return commit_shard(ledger, exported, moved, table, found.rejects)
