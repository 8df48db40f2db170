"""Checks that an output is finished and sound, and where a copy of it may be written."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.output.lease import LEASES
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.proof import Prover
from batchgen.plan.parts import Planned
from batchgen.storage import TEMPORARY, Store, is_within

_NAMED = 5


@dataclass(frozen=True)
class Proven:
    """A committed shard whose files match its marker and the plan."""

    marker: Marker
    table: pa.Table
    rejects: bytes | None


def refuse_unfinished(source: Ledger, plan: Planned, then: str) -> None:
    """Raises InputError if shards of the output are pending; ``then`` is what to repeat after."""
    pending = source.states(plan).pending
    if pending:
        more = ", ..." if len(pending) > _NAMED else ""
        numbers = ", ".join(map(str, pending[:_NAMED])) + more
        raise InputError(
            f"source {source.store.url}: {len(pending)} of {plan.shards} shards are pending or "
            f"failed ({numbers}); generate them with `batchgen resume`, then {then}"
        )


def signs_again(url: str) -> str:
    """The command that writes missing shards of a signed copy, which no run can make."""
    return f"`batchgen export SOURCE {url} --sign CERTIFICATE --key KEY`"


def refuse_signed(ledger: Ledger, command: str) -> None:
    """Raises InputError if the output is a signed copy, whose images no run can make."""
    plan = ledger.plan()
    if plan is not None and plan.spec.output.signed:
        url = ledger.store.url
        raise InputError(
            f"{url} is a signed copy, and a run does not sign, so `{command}` cannot make its "
            f"shards; repeat {signs_again(url)} from the output that it is a copy of"
        )


def refuse_nested(source: Ledger, target: Store) -> None:
    """Raises InputError if one of the two folders is inside of the other."""
    if is_within(target.url, source.store.url) or is_within(source.store.url, target.url):
        raise InputError(
            f"target {target.url} must not be inside the source output {source.store.url}, or the "
            "other way round"
        )


def refuse_unless_empty(target: Store, ours: tuple[str, ...] = ()) -> None:
    """Raises InputError if the target has other files than leases and those that start as ours."""
    ours = (f"{LEASES}/", f"{TEMPORARY}/", *ours)
    others = sorted(name for name in target.find("") if not name.startswith(ours))
    if others:
        raise InputError(f"target {target.url} is not empty ({others[0]}); choose an empty folder")


def proven(prover: Prover, shard: int) -> Proven:
    """Read a shard and check all of it.

    Raises:
        InputError: it is damaged, or its marker was removed meanwhile.
    """
    source = prover.ledger
    marker = source.marker(shard)
    if marker is None:
        raise InputError(
            f"source {source.store.url}: the marker of shard {shard} was removed during the export"
        )
    proof = prover.read(marker)
    if proof.table is None or proof.problems:
        raise InputError(
            f"source {source.store.url}: {proof.problems[0]}; see `batchgen verify "
            f"{source.store.url}`"
        )
    return Proven(marker, proof.table, proof.rejects)
