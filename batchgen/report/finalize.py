"""Ends a run: counts what is in storage once more, and writes the dataset card and the report."""

from __future__ import annotations

from batchgen import report
from batchgen.errors import LimitExceeded, VerifyFailed
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome, outcome_of, survey
from batchgen.output.shard_range import ShardRange, range_text
from batchgen.output.tally import Tally
from batchgen.plan.parts import Planned
from batchgen.report.digest import Digest


def finalize(
    plan: Planned, ledger: Ledger, tally: Tally, part: ShardRange | None = None, stopped: str = ""
) -> Outcome:
    """Count from storage once more, write the card and the report, and return the outcome.

    If several runs each do a range of shards, the last one to end writes them for the complete
    output. ``stopped`` says why this run stopped early, if it did.
    """
    states = ledger.states(plan)
    own = states if part is None else states.within(range(*part))
    digest = Digest()
    counted, exit_code, message = survey(plan, ledger, own, digest.add)
    if stopped and exit_code != VerifyFailed.exit_code:
        exit_code, message = LimitExceeded.exit_code, stopped
    if part is None:
        exit_code, message = report.write(plan, ledger, states, counted, digest, exit_code, message)
    elif len(states.committed) + len(states.failed) < plan.shards:
        done = len(states.committed)
        message = f"shards {range_text(part)}: {message}; in all {done} of {plan.shards} committed"
    else:
        digest = Digest()
        whole, code, said = survey(plan, ledger, states, digest.add)
        report.write(plan, ledger, states, whole, digest, code, said)
        message = f"shards {range_text(part)}: {message}; no other shard is pending"
    return outcome_of(counted, tally, ledger.store.url, exit_code, message)
