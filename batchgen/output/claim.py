"""How a run takes its output: a free place, the plan that is there, or one that made nothing."""

from __future__ import annotations

from collections.abc import Callable

from batchgen.errors import DamagedRecord, PlanChanged
from batchgen.output.holdings import anything_made, forget_failures
from batchgen.output.ledger import JOB, PLAN, Ledger
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.spec.spec import Spec

_ANEW = "start this one anew with `batchgen run --overwrite`"


def plan_to_keep(ledger: Ledger) -> Plan | None:
    """The plan that binds a run; None where there is none, or one of which nothing was made.

    Raises:
        DamagedRecord, NewerFormat: it cannot be read, and something was made.
    """
    try:
        saved = ledger.plan()
    except DamagedRecord:
        if anything_made(ledger):
            raise
        return None
    return saved if saved is None or anything_made(ledger) else None


def claim(ledger: Ledger, plan: Plan, asked: Spec, say: Callable[[str], None], whole: bool) -> Plan:
    """Freeze the plan, or go on with the one that is there if it is the same.

    Where nothing was made yet and the run holds the ``whole`` output, another plan is replaced.

    Returns:
        The plan to work by.

    Raises:
        PlanChanged, DamagedRecord: the plan there is another, or damaged, and has been worked by.
    """
    if ledger.freeze(plan, asked):
        return plan
    try:
        plan = compare(ledger.require_plan(), plan)
    except (PlanChanged, DamagedRecord) as error:
        if not whole or anything_made(ledger):
            raise type(error)(f"{error}, or {_ANEW}") from error
        say(f"the plan is replaced, since nothing was made by it ({str(error).partition(';')[0]})")
        forget_failures(ledger)
        ledger.store.put(JOB, asked.to_yaml().encode())
        ledger.store.put(PLAN, plan.to_json().encode())
        return plan
    ledger.keep_job(asked)
    return plan


def job_of(ledger: Ledger) -> Spec:
    """The spec that the last run was given, with the output where it is now.

    Raises:
        InputError: nothing was run into this output, or its spec is damaged.
    """
    ledger.require_plan()
    spec = ledger.job()
    here = spec.output.model_copy(update={"url": ledger.store.url})
    return spec.model_copy(update={"output": here})
