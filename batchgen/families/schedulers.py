"""The schedulers and scheduler options that can be used, and the reasons to refuse others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchgen.errors import ModelError, nearest
from batchgen.families.diffusers_source import defaults_of

# Tests show for each that a sample's bytes do not depend on its neighbours.
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
# Flow-matching models only run with these, and all other models only with the others.
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
_OWN_NOISE = "it draws noise from a generator of its own, so a sample's seed does not fix its image"
REFUSED_SCHEDULERS = {
    "DPMSolverSDEScheduler": _OWN_NOISE,
    "CosineDPMSolverMultistepScheduler": _OWN_NOISE,
}
REFUSED_OPTIONS = {"stochastic_sampling": _OWN_NOISE}
# Options whose wrong values would be noticed only while images are generated.
OPTION_VALUES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}


def check_scheduler(name: str) -> str:
    """Return the name, if that scheduler can be used. Imports nothing.

    Raises:
        ModelError: it is refused (with the reason) or unknown (with the nearest known name).
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
    """Return the scheduler in effect: the wanted one, or the one that was saved with the model.

    Raises:
        ModelError: it cannot be used, or only one of model and scheduler is for flow matching.
    """
    name = check_scheduler(wanted or saved)
    if (name in FLOW_SCHEDULERS) != (saved in FLOW_SCHEDULERS):
        allowed = FLOW_SCHEDULERS if saved in FLOW_SCHEDULERS else SCHEDULERS
        raise ModelError(
            f"scheduler {name} cannot replace the model's {saved}: only one of them is for flow"
            f" matching; allowed: {', '.join(allowed)}"
        )
    return name


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check that a scheduler has options of these names and types. Imports nothing.

    Raises:
        ModelError: names the first option that is wrong, and what is allowed.
    """
    known = defaults_of(name) if options else {}
    for option, value in options.items():
        field, default = f"model.scheduler_options.{option}", known.get(option)
        if option not in known:
            raise ModelError(
                f"{field}: {name} has no such option; allowed: {', '.join(known)}"
                f"{nearest(option, known)}"
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
    """Select those of the run's options that a scheduler has."""
    known = defaults_of(name) if options else {}
    return {option: value for option, value in options.items() if option in known}
