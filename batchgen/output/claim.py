"""Decides whether a run may use an output: it is free, has the same plan, or an unused plan."""

from __future__ import annotations

from collections.abc import Callable

from batchgen.errors import DamagedRecord, InputError, PlanChanged, RetryShard, StorageFailed
from batchgen.output.extension import extend
from batchgen.output.finished import refuse_signed
from batchgen.output.holdings import anything_made, forget_failures
from batchgen.output.ledger import JOB, PARTS, PLAN, Ledger
from batchgen.plan.choices import keep_choices
from batchgen.plan.extend import unfinished
from batchgen.plan.parts import Parts
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare
from batchgen.plan.sizes import lowered
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


def choices_ahead(spec: Spec) -> Spec:
    """The spec with the choices that a run would keep from the output's plan.

    The plan is read only if a field of the spec depends on it; an output that cannot be reached
    counts as one without a plan.
    """
    if not spec.open_fields and spec.output.provenance is not None:
        return spec
    try:
        saved = plan_to_keep(Ledger(open_store(spec.output.url).without_retries()))
    except (InputError, RetryShard, StorageFailed):
        return spec
    return keep_choices(spec, saved)


def claim(
    ledger: Ledger, plan: Plan, asked: Spec, say: Callable[[str], None], whole: bool
) -> Parts:
    """Freeze the plan, or continue the output's plan if it is the same.

    A different plan is replaced if nothing was generated with it and this run holds the ``whole``
    output.

    Returns:
        The parts that the run generates: its plan, and those that extended the output.

    Raises:
        PlanChanged, DamagedRecord: the output's plan is different or damaged, and was used.
    """
    if ledger.freeze(plan, asked):  # also if the very same plan is there
        return _all_parts(ledger, plan, whole)
    try:
        plan = compare(ledger.require_plan(), plan)
    except (PlanChanged, DamagedRecord) as error:
        if not whole or anything_made(ledger) or ledger.store.list(PARTS):
            raise type(error)(f"{error}, or {_ANEW}") from error
        why = str(error).partition(";")[0]
        say(f"the plan is replaced, since nothing was generated with it ({why})")
        forget_failures(ledger)
        ledger.store.put(JOB, asked.to_yaml().encode())
        ledger.store.put(PLAN, plan.to_json().encode())
        return Parts([plan])
    ledger.keep_job(asked)
    return _all_parts(ledger, plan, whole)


def _all_parts(ledger: Ledger, plan: Plan, whole: bool) -> Parts:
    """The parts of the output; an extension that was interrupted is completed by a whole run."""
    if whole:
        extend(ledger, unfinished(ledger.parts()))
    return Parts([plan, *ledger.parts()[1:]])


def job_of(
    ledger: Ledger, batch_size: int | None = None, decode_batch_size: int | None = None
) -> tuple[Spec, Spec]:
    """The spec of the output's plan, and the spec as the user gave it to the last run.

    The second has the output's present location, and the sizes of calls that are given here.

    Raises:
        InputError: the output has no plan or is a signed copy, or its spec is damaged.
        SpecError: a size is larger than the planned one.
    """
    refuse_signed(ledger, "batchgen resume")
    planned, spec = ledger.require_plan().spec, ledger.job()
    here = spec.output.model_copy(update={"url": ledger.store.url})
    spec = spec.model_copy(update={"output": here})
    return planned, lowered(spec, planned.resources, batch_size, decode_batch_size)
