"""Withdraws damaged shards of an output, so that the next run regenerates them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from batchgen.errors import Interrupted, VerifyFailed
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger, is_of_a_shard, marker_name
from batchgen.output.proof import SKIPPABLE
from batchgen.output.score_proof import withdraw_scores
from batchgen.output.verify import Findings, numbers, verify

ASIDE = "_batchgen/aside"


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        found: the findings of the verification before it.
        withdrawn: shards whose markers were removed; they are pending now.
        aside: old name -> new name of each file that belonged to no shard.
        scores: a line for each shard of a score set that was withdrawn.
    """

    found: Findings
    withdrawn: tuple[int, ...]
    aside: dict[str, str]
    scores: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line for each shard and file that was changed."""
        told = [f"withdrawn: shard {shard}" for shard in self.withdrawn]
        return (
            told
            + list(self.scores)
            + [f"set aside: {name}, to {place}" for name, place in self.aside.items()]
        )

    def sentence(self, url: str) -> str:
        """The result in one line, with what to do next."""
        found = self.found
        if found.ok:
            return found.sentence(url)
        pending = found.pending + found.failed_shards + len(self.withdrawn)
        told = (
            f"{len(self.withdrawn)} of {found.shards} shards were withdrawn, {len(self.aside)} "
            "files set aside"
        )
        if pending:
            told += f"; shards pending: {pending}, {found.makes(url)} generates them"
        if found.flaws:
            told += (
                f"; shards of score sets: {len(self.scores)}, `batchgen score {url}` scores them"
            )
        if found.other:
            told += (
                f"; {len(found.other)} of {found.shards} shards are undamaged but do not match the "
                f"plan ({numbers(found.other)}): they were left as they are, and no file was set "
                "aside, since plan.json may be that of another output; if it belongs to this one, "
                f"remove their markers ({marker_name(found.other[0])}"
                f"{', ...' if found.other[1:] else ''}), and {found.makes(url)} "
                "regenerates them"
            )
        return told

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong; 3: a run generates what is missing; 4: something else is wrong."""
        found, undone = self.found, (*self.withdrawn, *self.scores)
        if found.ok or not (found.other or found.pending or undone):
            return 0
        return VerifyFailed.exit_code if self.found.other else Interrupted.exit_code


def repair(ledger: Ledger, quick: bool = False) -> Repaired:
    """Verify the output, withdraw its damaged shards, and set aside files that belong to no shard.

    A shard is damaged if its marker or a file is missing or does not have the committed bytes. Its
    marker is removed first and then the damaged files; undamaged files stay, and the next run
    overwrites them with the same bytes. Undamaged shards that belong to another plan or do not
    match the plan are left as they are, and then no file is set aside either: the plan may be the
    wrong one. The output's lease is held meanwhile. ``quick``: check only listings and markers.

    Raises:
        OutputBusy: a run is working on the output.
        Interrupted: another run took the lease.
    """
    ledger.parts()
    store = ledger.store
    with hold_lease(store, lambda reason: None) as lease:
        found = verify(ledger, quick, SKIPPABLE)
        # If the plan is that of another output, no file would seem to belong to a shard.
        strays = () if found.other else found.strays
        aside = {name: f"{ASIDE}/{name}" for name in strays}
        removed = [name for name in found.lost if is_of_a_shard(name)]
        steps = [
            *(partial(ledger.withdraw, shard) for shard in found.damaged),
            *(partial(store.delete, name) for name in removed),
        ]
        for step in steps:
            if lease.lost.is_set():
                raise Interrupted("another run has taken over this output's lease")
            step()
        for name, place in aside.items():
            store.move(name, place)
        scores = withdraw_scores(ledger, found.flaws)
    return Repaired(found, tuple(found.damaged), aside, tuple(scores))
