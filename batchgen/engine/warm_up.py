"""Compiles a replica's model before its first shard (``resources.compile``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from batchgen.plan.call_settings import usual_call
from batchgen.plan.plan import Plan
from batchgen.records import Call


def planned_calls(plan: Plan) -> list[Call]:
    """Calls of all shapes that the plan's rows may need: with guidance, and without it.

    All rows have one size where the model is compiled (``spec.checks``).
    """
    usual = usual_call(plan.spec, plan.model)
    if plan.spec.input.columns.guidance_scale is None or not plan.model.guidable:
        return [usual]
    with_guidance = max(usual.guidance_scale, 2.0)
    return [replace(usual, guidance_scale=scale) for scale in (with_guidance, 1.0)]


def compile_before(plan: Plan, where: str, held: Callable[[], Mapping[str, Any]]) -> str | None:
    """Compile what the spec asks for, in every planned shape; returns what to tell about it.

    Args:
        plan: the plan of the job.
        where: names the replica in the message.
        held: gives its stages: ``encode``, ``denoise``, ``decode``.

    Raises:
        StopJob: the model cannot be compiled, or the shared code cannot be read.
    """
    if plan.spec.resources.compile is None:
        return None
    stages = held()
    if not stages.keys() - {"encode"}:
        return None
    from batchgen.models.warm_up import warm_up

    found = warm_up(plan.model, plan.spec, planned_calls(plan), stages)
    kept = f"{found.graphs - found.fresh} from the cache of compiled code"
    fresh = f"{found.fresh} newly compiled" if found.fresh else "none newly compiled"
    shared = f"; {found.shared}" if found.shared else ""
    return (
        f"{where} warmed up in {found.seconds:.0f} s: {found.graphs} compiled functions, {kept}, "
        f"{fresh}{shared}"
    )
