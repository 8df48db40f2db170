"""The end of a run: what storage holds is counted once more, and the card and report written."""

from __future__ import annotations

from batchgen import report
from batchgen.errors import LimitExceeded, VerifyFailed
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome, outcome_of, survey
from batchgen.output.shard_range import ShardRange, range_text
from batchgen.output.tally import Tally
from batchgen.plan.plan import Plan
from batchgen.report.digest import Digest


def finalize(
    plan: Plan, ledger: Ledger, tally: Tally, part: ShardRange | None = None, stopped: str = ""
) -> Outcome:
    """Count from storage once more, write the card and the report, and say how it ended.

    Of the runs that each make a part, the one that ends last writes them, for the whole.
    ``stopped`` says why this run was stopped early, if it was.
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
        message = f"shards {range_text(part)}: {message}; none is pending elsewhere"
    return outcome_of(counted, tally, ledger.store.url, exit_code, message)
