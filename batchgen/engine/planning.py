"""Plans a job: finds its model and its device, and chooses what the spec leaves open."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from batchgen.cluster.gpus import device_for
from batchgen.engine.batch_size import sized
from batchgen.engine.interrupt import interruptible
from batchgen.engine.scoring import with_scorers
from batchgen.models import check_compile, inspect
from batchgen.output.extension import Extension, extend, further_parts
from batchgen.output.finished import refuse_signed
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.plan.choices import keep_choices, pinned
from batchgen.plan.extend import unfinished
from batchgen.plan.parts import Parts
from batchgen.plan.plan import Plan, make_plan
from batchgen.plan.saved import compare
from batchgen.plan.scores import keep_settled
from batchgen.plan.sizes import as_planned, resized
from batchgen.records import DeviceInfo
from batchgen.spec.sections import Resources
from batchgen.spec.spec import Spec


def plan_for(
    spec: Spec, address: str | None, saved: Plan | None = None, planned: Spec | None = None
) -> tuple[Plan, Resources]:
    """Plan a job for local Ray, or for the cluster at ``address``.

    Args:
        spec: what the run should generate.
        address: of the cluster, see ``cluster.addresses.joined``.
        saved: the plan of the output that the run continues; its choices are kept.
        planned: the spec of that plan, if the run may make smaller calls.

    Returns:
        The plan, without any ``auto``, and the resources with the sizes of this run's calls.
    """
    spec = keep_settled(keep_choices(spec, saved), saved)
    model, device = inspect(pinned(spec.model, saved), spec.task), device_for(spec, address)
    check_compile(spec, model)
    spec, notes = sized(spec, model, device)
    notes = (*notes, *idle_offload(spec.resources, device))
    if saved is None:
        made = with_scorers(make_plan(spec, model, device))
        return replace(made, notes=(*made.notes, *notes)), spec.resources
    spec_then = as_planned(spec, planned)
    plan = make_plan(spec_then, model, device, check_keys=False, place=saved.place)
    return with_scorers(replace(plan, listing=saved.listing)), spec.resources


def runnable(
    parts: Parts,
    sizes: Resources,
    spec: Spec,
    address: str | None,
    planned: Spec | None,
    pending: Collection[int],
) -> list[Plan]:
    """The parts that have pending shards, with the sizes of this run's calls.

    The first part was planned again by the run; the others are planned again here, from their
    inputs and the run's spec, and compared with the output's plans.

    Raises:
        PlanChanged: the input or the model has changed since a part was planned.
    """
    found = []
    for number in sorted({parts.of(shard).place.part for shard in pending}):
        part, own = parts[number], sizes
        if number:
            made, own = plan_for(spec_of(part, spec), address, part, planned and part.spec)
            part = compare(part, made)
        found.append(resized(part, own))
    return found


def extend_output(ledger: Ledger, wanted: Extension, address: str | None) -> list[Plan]:
    """Add the parts that an extension needs to an output, which this process then holds.

    Raises:
        InputError: the output is a signed copy.
        OutputBusy: a run holds the output.
        PlanChanged: the input or the model has changed since the output was planned.
    """
    refuse_signed(ledger, "batchgen extend")
    with interruptible() as interrupt, hold_lease(ledger.store, interrupt) as lease:
        extend(ledger, unfinished(ledger.parts()))
        plans = planned_parts(ledger, wanted, address)
        extend(ledger, plans)
        lease.ending = f"extended by {len(plans)} part{'' if len(plans) == 1 else 's'}"
    return plans


def planned_parts(ledger: Ledger, wanted: Extension, address: str | None) -> list[Plan]:
    """The parts that the extension adds, if a run can make them as they are; writes nothing."""
    refuse_signed(ledger, "batchgen extend")
    asked = ledger.job()
    plans = further_parts(ledger, wanted, asked)
    for plan in plans:
        compare(plan, plan_for(spec_of(plan, asked), address, plan, plan.spec)[0])
    return plans


def spec_of(part: Plan, spec: Spec) -> Spec:
    """The spec of a run for one of its parts, which has its own input and variants."""
    names = ("path", "limit", "count")
    own = {name: getattr(part.spec.input, name) for name in names}
    source = spec.input.model_copy(update=own)
    return spec.model_copy(update={"input": source, "variants": part.spec.variants})


def idle_offload(resources: Resources, device: DeviceInfo | None) -> tuple[str, ...]:
    """What to tell about stages that the spec offloads, but that will run on CPUs."""
    on_cpu = device is not None and not device.is_gpu
    idle = [one for one in resources.offload if on_cpu or resources.pool_of(one)[1].num_gpus == 0]
    if not idle:
        return ()
    return (
        f"resources.offload has no effect on {', '.join(idle)}: on a CPU the weights are in host "
        "memory anyway",
    )
