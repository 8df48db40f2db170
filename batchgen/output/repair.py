"""Withdraws what storage has lost or changed of an output, so that a run makes it again."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.errors import Interrupted, VerifyFailed
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import DATA, REJECTS, SHARDS, Ledger
from batchgen.output.proof import SKIPPABLE
from batchgen.output.verify import Findings, numbers, verify

ASIDE = "_batchgen/aside"


@dataclass(frozen=True)
class Repaired:
    """What was withdrawn.

    Attributes:
        found: what verification had seen before.
        withdrawn: shards whose markers are gone; they are pending now.
        aside: where each file that was no shard's lies now, by its old name.
    """

    found: Findings
    withdrawn: tuple[int, ...]
    aside: dict[str, str]

    def lines(self) -> list[str]:
        """What was done, a line each."""
        told = [f"withdrawn: shard {shard}" for shard in self.withdrawn]
        return told + [f"set aside: {name}, to {place}" for name, place in self.aside.items()]

    def sentence(self, url: str) -> str:
        """The whole in a line, with what to do."""
        found = self.found
        if found.ok:
            return found.sentence(url)
        pending = found.pending + found.failed_shards + len(self.withdrawn)
        told = (
            f"{len(self.withdrawn)} of {found.shards} shards were withdrawn, {len(self.aside)} "
            "files set aside"
        )
        if pending:
            told += f"; {pending} shards are pending: `batchgen resume {url}` makes them"
        if found.other:
            told += (
                f"; {len(found.other)} shards are whole and not what was planned "
                f"({numbers(found.other)}): they were left as they are, and no file was set aside, "
                "since plan.json may be another output's; if it is this one's, remove their "
                f"markers ({SHARDS}/{found.other[0]:05d}.json"
                f"{', ...' if found.other[1:] else ''}) and `batchgen resume {url}` makes "
                "them again"
            )
        return told

    @property
    def exit_code(self) -> int:
        """0: all is well; 3: a run makes what is missing; 4: something else is wrong."""
        if self.found.ok or not (self.found.other or self.found.pending or self.withdrawn):
            return 0
        return VerifyFailed.exit_code if self.found.other else Interrupted.exit_code


def repair(ledger: Ledger, quick: bool = False) -> Repaired:
    """Verify the output, withdraw its damaged shards, and set files aside that are no shard's.

    A damaged shard has lost a file or its marker, or has one with other bytes than were committed.
    Its marker goes first and then the damaged files; whole ones stay, and are what the next run
    writes again. Shards that are whole and made for another plan, or not what was planned, are left
    alone, and no file is set aside beside them: it may be the plan that is wrong. The output's
    lease is held meanwhile. ``quick``: look at listings and markers only.

    Raises:
        OutputBusy: a run is at work on it.
        Interrupted: another run took the lease.
    """
    ledger.require_plan()
    store = ledger.store
    with hold_lease(store, lambda reason: None) as lease:
        found = verify(ledger, quick, SKIPPABLE)
        # With another output's plan lying here, everything would look like no shard's.
        strays = () if found.other else found.strays
        aside = {name: f"{ASIDE}/{name}" for name in strays}
        for name in (*(f"{SHARDS}/{shard:05d}.json" for shard in found.damaged), *found.lost):
            if lease.lost.is_set():
                raise Interrupted("another run has taken over this output's lease")
            if name.startswith((f"{SHARDS}/", f"{DATA}/", f"{REJECTS}/")):
                store.delete(name)
        for name, place in aside.items():
            store.move(name, place)
    return Repaired(found, tuple(found.damaged), aside)
