"""The sizes of calls, which a resume may lower for the shards that are left.

A plan keeps its own sizes and its fingerprint; each marker says the sizes that its shard had.
"""

from __future__ import annotations

from dataclasses import replace

from batchgen.errors import SpecError
from batchgen.plan.plan import Frozen, Plan
from batchgen.spec.model import AUTO
from batchgen.spec.sections import Resources
from batchgen.spec.spec import Spec


def lowered(
    job: Spec, planned: Resources, batch_size: int | None, decode_batch_size: int | None
) -> Spec:
    """The spec of the last run with smaller calls; None keeps the size of the last run.

    Raises:
        SpecError: a size is larger than the planned one.
    """
    now = job.resources
    asked = now.batch_size if batch_size is None else batch_size
    batch = asked if isinstance(asked, int) else planned.micro_batch
    _check("batch_size", batch, planned.micro_batch)
    decode = now.decode_batch_size if decode_batch_size is None else decode_batch_size
    if decode is None and now.batch_size == AUTO and planned.decode_size < batch:
        decode = planned.decode_size
    elif decode is not None and decode_batch_size is None:
        decode = min(decode, batch)
    size = batch if decode is None else decode
    _check("decode_batch_size", size, min(planned.decode_size, batch))
    sizes = {"batch_size": asked, "decode_batch_size": decode}
    return job.model_copy(update={"resources": now.model_copy(update=sizes)})


def _check(name: str, given: int, most: int) -> None:
    if not 1 <= given <= most:
        raise SpecError(f"resources.{name}", given, f"1 to {most}; a resume cannot raise it")


def as_planned(spec: Spec, planned: Spec | None) -> Spec:
    """The spec with the sizes of the plan's spec; unchanged without one."""
    return spec if planned is None else _with_sizes(spec, planned.resources)


def resized(plan: Plan, resources: Resources) -> Plan:
    """The plan for actors that make calls of these sizes; its fingerprints stay the same."""
    spec = _with_sizes(plan.spec, resources)
    return replace(plan, spec=spec, frozen=plan.frozen or Frozen(plan.fingerprints))


def _with_sizes(spec: Spec, resources: Resources) -> Spec:
    """The spec with these sizes; its own where they are ``auto``."""
    if resources.batch_size == AUTO:
        return spec
    names = ("batch_size", "decode_batch_size")
    sizes = {name: getattr(resources, name) for name in names}
    return spec.model_copy(update={"resources": spec.resources.model_copy(update=sizes)})
