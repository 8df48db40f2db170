"""Plans a job: finds its model and its device, and chooses what the spec leaves open."""

from __future__ import annotations

from dataclasses import replace

from batchgen.cluster.gpus import device_for
from batchgen.engine.batch_size import sized
from batchgen.models import check_compile, inspect
from batchgen.plan.choices import keep_choices, pinned
from batchgen.plan.plan import Plan, make_plan
from batchgen.plan.sizes import as_planned
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
    spec = keep_choices(spec, saved)
    model, device = inspect(pinned(spec.model, saved), spec.task), device_for(spec, address)
    check_compile(spec, model)
    spec, notes = sized(spec, model, device)
    notes = (*notes, *idle_offload(spec.resources, device))
    if saved is None:
        made = make_plan(spec, model, device)
        return replace(made, notes=(*made.notes, *notes)), spec.resources
    plan = make_plan(as_planned(spec, planned), model, device, check_keys=False)
    return plan, spec.resources


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
