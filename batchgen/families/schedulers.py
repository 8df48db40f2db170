"""Which schedulers can be used, and what is said of any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchgen.errors import ModelError, nearest
from batchgen.families.diffusers_source import defaults_of

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
REFUSED_OPTIONS = {"stochastic_sampling": _OWN_NOISE}
# Options whose wrong values come to light only while images are made.
OPTION_VALUES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
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


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """That a scheduler takes options of these names and kinds. Imports nothing.

    Raises:
        ModelError: the first that it does not take, with what it takes.
    """
    known = defaults_of(name) if options else {}
    for option, value in options.items():
        field, default = f"model.scheduler_options.{option}", known.get(option)
        if option not in known:
            raise ModelError(
                f"{field}: {name} has none; allowed: {', '.join(known)}{nearest(option, known)}"
            )
        if option in REFUSED_OPTIONS and value:
            raise ModelError(f"{field} cannot be used: {REFUSED_OPTIONS[option]}")
        if option in OPTION_VALUES and value not in OPTION_VALUES[option]:
            allowed = ", ".join(OPTION_VALUES[option])
            raise ModelError(f"{field}: got {value!r}; allowed: {allowed}")
        kind = (int, float) if type(default) in (int, float) else type(default)
        fits = isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
        if type(default) in (bool, int, float, str) and not fits:
            raise ModelError(f"{field}: got {value!r}; allowed: a value like {default!r}")


def options_for(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run's options those that a scheduler knows."""
    known = defaults_of(name) if options else {}
    return {option: value for option, value in options.items() if option in known}
