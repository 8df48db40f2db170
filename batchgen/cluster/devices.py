"""Finds the GPUs that Ray reserved for a replica; refuses one that torch or Ray cannot use."""

from __future__ import annotations

import os

import ray

from batchgen.cluster.driver import hidden_gpu, seen_by_torch, why_none
from batchgen.cluster.session import is_private
from batchgen.errors import ModelError, UsageError
from batchgen.spec.spec import Spec


def devices() -> list[str]:
    """The devices that Ray reserved for this actor: ``cuda:0``, ...; ``cpu`` if it has no GPU.

    Raises:
        ModelError: torch cannot use them. (On the CPU the job would take a hundred times as long.)
    """
    given = len(ray.get_gpu_ids()) if ray.is_initialized() else 0
    if not given:
        return ["cpu"]
    seen = len(seen_by_torch())
    if seen < given:
        raise ModelError(
            f"this replica has {given} GPU of {os.uname().nodename} reserved, but torch can use "
            f"{seen} of them: {why_none()}; or run on CPUs with num_gpus: 0 in each pool of "
            "resources"
        )
    return [f"cuda:{number}" for number in range(given)]


def refuse_hidden_gpu(spec: Spec) -> None:
    """Refuse to run silently on the CPU if this machine has a GPU that Ray does not find.

    It applies only to a run that starts Ray here.

    Raises:
        UsageError: there is such a GPU, and the spec does not set ``num_gpus: 0``.
    """
    if not is_private() or not spec.resources.may_use_gpus:
        return
    if ray.cluster_resources().get("GPU"):
        return
    if what := hidden_gpu():
        *others, last = spec.resources.pools
        names = f"{', '.join(others)} and {last}" if others else last
        raise UsageError(
            f"this machine has a GPU that Ray does not find ({what}), so the job would run on the "
            f"CPU; fix the driver, or set num_gpus: 0 in resources.{names} to run on the CPU"
        )
