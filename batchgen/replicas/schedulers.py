"""Which schedulers can be used, and what is said of any other."""

from __future__ import annotations

from batchgen.errors import ModelError, nearest

# Each is tested to give a sample the same bytes whatever its neighbours are.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Those of models of flow matching, which run with no other, and no other model with them.
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
_OWN_NOISE = "it draws noise from a generator of its own, so a sample's seed does not fix its image"
REFUSED_SCHEDULERS = {
    "DPMSolverSDEScheduler": _OWN_NOISE,
    "CosineDPMSolverMultistepScheduler": _OWN_NOISE,
}


def check_scheduler(name: str) -> str:
    """The name back, if it is a scheduler that can be used. Imports nothing.

    Raises:
        ModelError: refused (with the reason) or unknown (with the nearest known name).
    """
    if name in REFUSED_SCHEDULERS:
        raise ModelError(f"scheduler {name} cannot be used: {REFUSED_SCHEDULERS[name]}")
    known = (*SCHEDULERS, *FLOW_SCHEDULERS)
    if name not in known:
        raise ModelError(
            f"scheduler: got {name!r}; allowed: {', '.join(known)}{nearest(name, known)}"
        )
    return name


def chosen_scheduler(saved: str, wanted: str | None) -> str:
    """The scheduler in effect: the wanted one, or that with which the model was saved.

    Raises:
        ModelError: it cannot be used, or either of model and scheduler is of flow matching alone.
    """
    name = check_scheduler(wanted or saved)
    if (name in FLOW_SCHEDULERS) != (saved in FLOW_SCHEDULERS):
        allowed = FLOW_SCHEDULERS if saved in FLOW_SCHEDULERS else SCHEDULERS
        raise ModelError(
            f"scheduler {name} cannot replace the model's {saved}: one is of flow matching, the"
            f" other is not; allowed: {', '.join(allowed)}"
        )
    return name
