"""Decides whether a run may use an output: it is free, has the same plan, or an unused plan."""

from __future__ import annotations

from collections.abc import Callable

from batchgen.errors import DamagedRecord, InputError, PlanChanged, RetryShard, StorageFailed
from batchgen.output.holdings import anything_made, forget_failures
from batchgen.output.ledger import JOB, PLAN, Ledger
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.spec.spec import Spec
from batchgen.storage import open_store

_ANEW = "start over in this one with `batchgen run --overwrite`"


def plan_to_keep(ledger: Ledger, whole: bool = True) -> Plan | None:
    """The output's plan, which a run must keep; None if it has none or nothing was generated yet.

    A run that does not generate the ``whole`` output keeps an unused plan as well, since runs of
    other shards may have begun with it.

    Raises:
        DamagedRecord, NewerFormat: the plan cannot be read, and something was generated.
    """
    try:
        saved = ledger.plan()
    except DamagedRecord:
        if anything_made(ledger):
            raise
        return None
    return saved if saved is None or not whole or anything_made(ledger) else None


def plan_ahead(spec: Spec) -> Plan | None:
    """The plan that a run of this spec would keep; None as well if the output cannot be reached.

    It is read only if a field of the spec depends on it.
    """
    if not spec.open_fields:
        return None
    try:
        return plan_to_keep(Ledger(open_store(spec.output.url).without_retries()))
    except (InputError, RetryShard, StorageFailed):
        return None


def claim(ledger: Ledger, plan: Plan, asked: Spec, say: Callable[[str], None], whole: bool) -> Plan:
    """Freeze the plan, or continue the output's plan if it is the same.

    A different plan is replaced if nothing was generated with it and this run holds the ``whole``
    output.

    Returns:
        The plan that the run uses.

    Raises:
        PlanChanged, DamagedRecord: the output's plan is different or damaged, and was used.
    """
    if ledger.freeze(plan, asked):
        return plan
    try:
        plan = compare(ledger.require_plan(), plan)
    except (PlanChanged, DamagedRecord) as error:
        if not whole or anything_made(ledger):
            raise type(error)(f"{error}, or {_ANEW}") from error
        why = str(error).partition(";")[0]
        say(f"the plan is replaced, since nothing was generated with it ({why})")
        forget_failures(ledger)
        ledger.store.put(JOB, asked.to_yaml().encode())
        ledger.store.put(PLAN, plan.to_json().encode())
        return plan
    ledger.keep_job(asked)
    return plan


def job_of(ledger: Ledger) -> Spec:
    """The spec as the user gave it to the last run, with the output's present location.

    Raises:
        InputError: the output has no plan, or its spec is damaged.
    """
    ledger.require_plan()
    spec = ledger.job()
    here = spec.output.model_copy(update={"url": ledger.store.url})
    return spec.model_copy(update={"output": here})
