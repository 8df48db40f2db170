"""Resolves each setting of a call: row value, else spec, else model; checks the model's limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from batchgen.errors import ModelError
from batchgen.families.schedulers import chosen_scheduler
from batchgen.records import Call, ModelInfo
from batchgen.spec.call_settings import CALL_SETTINGS
from batchgen.spec.model import Model
from batchgen.spec.sections import MAX_TEXT, Sampling
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import parse_lora

# Settings that every pipeline takes. Of the others, a pipeline takes those that its family lists.
ALWAYS = ("num_inference_steps", "guidance_scale", "width", "height", "scheduler")
ANY_REGION = [{"phrase": "a thing", "box": [0.1, 0.1, 0.9, 0.9]}]


@dataclass(frozen=True)
class Settings:
    """Where a setting comes from if a row does not set it."""

    sampling: Sampling
    info: ModelInfo
    model: Model

    def takes(self, name: str) -> bool:
        return name in ALWAYS or name in self.info.settings or name == "lora"


def usual_call(spec: Spec, info: ModelInfo) -> Call:
    """The call of a row that sets nothing itself, to compute its cost; its regions are invented."""
    settings = Settings(spec.sampling, info, spec.model)
    given = {
        one.name: read_setting(settings, one.name, None)
        for one in fields(Call)
        if one.name != "regions"
    }
    if "regions" in info.settings:
        given["regions"] = _regions(ANY_REGION)
    if spec.input.columns.image is None:
        given["strength"] = None  # as for a row without a source image
    return Call(**given)


def read_setting(settings: Settings, name: str, value: Any) -> Any:
    """Return the row's value if it has one, else the spec's.

    The result is None (0 for eta) if the model does not support the setting.

    Raises:
        ValueError: the value is not allowed; the message says what is.
    """
    if not settings.takes(name):
        return 0.0 if name == "eta" else None
    if name == "lora":
        return _lora(settings, value)
    if name == "scheduler":
        return _scheduler(settings, value)
    if name == "regions":
        return _regions(value)
    given = getattr(settings.sampling, name) if value is None else value
    if name == "strength" and given is None:
        given = settings.info.strength
    if given is None:
        return None
    try:
        checked = CALL_SETTINGS[name].adapter.validate_python(given)
    except ValidationError as error:
        raise ValueError(_allowed(error)) from error
    _check_limits(settings.info, name, checked)
    if name == "control_scale":
        return _scales(settings.info, checked)
    return float(checked) if name == "guidance_scale" else checked


def _allowed(error: ValidationError) -> str:
    """Say what pydantic allows instead of the refused value."""
    text: str = error.errors()[0]["msg"].removeprefix("Input should be ")
    text = text.replace("String should have at most", "text, up to")
    return text.replace("String should", "text that should")


def _check_limits(info: ModelInfo, name: str, value: Any) -> None:
    """Refuse values that are valid in general, but not with this model."""
    if name in ("width", "height"):
        native = getattr(info, name)
        if info.fixed_size and value != native:
            raise ValueError(f"{native}, the only {name} of this model")
        if value % info.multiple_of:
            raise ValueError(f"a multiple of {info.multiple_of}, for this model")
    if name == "num_inference_steps" and value < info.min_steps:
        raise ValueError(f"at least {info.min_steps} steps, for a {info.family} model")
    if name == "noise_level" and value > info.max_noise_level:
        raise ValueError(f"up to {info.max_noise_level}, for this model")
    if name == "guidance_scale" and value > 1 and not info.guidable:
        classes = len(info.class_names)
        raise ValueError(
            f"up to 1, since a {info.family} model of {classes} classes does not support guidance"
        )


def _scales(info: ModelInfo, given: float | tuple[float, ...]) -> tuple[float, ...]:
    """Return one weight for each control image."""
    if isinstance(given, float | int):
        return (float(given),) * max(1, info.controls)
    if len(given) != info.controls:
        raise ValueError(f"one number, or one for each of {info.controls} control images")
    return tuple(float(one) for one in given)


def _scheduler(settings: Settings, value: Any) -> str | None:
    """Return None for the run's own scheduler, so that rows naming it share its micro-batches."""
    if value is None or value == settings.info.scheduler:
        return None
    allowed = settings.info.schedulers
    if allowed and value not in allowed:
        raise ValueError(", ".join(allowed))
    try:
        return chosen_scheduler(settings.info.scheduler, str(value))
    except ModelError as error:
        raise ValueError(str(error)) from error


def _lora(settings: Settings, value: Any) -> tuple[tuple[str, float], ...] | None:
    """Return None if the run loads no LoRA, and all of them if neither row nor spec names any."""
    known = settings.model.lora_weights
    if not known:
        return None
    given = settings.sampling.lora if value is None else value
    return tuple(sorted(known.items())) if given is None else parse_lora(str(given), known)


def _regions(value: Any) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Check phrases and their boxes (x0, y0, x1, y1), which are in fractions of the image."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of {phrase, box}, at least one")
    found = []
    for region in value:
        if not isinstance(region, dict):
            raise ValueError("a list of {phrase, box}, at least one")
        phrase, box = region.get("phrase"), region.get("box")
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError("a phrase for every box")
        if len(phrase) > MAX_TEXT:
            raise ValueError(f"phrases of up to {MAX_TEXT} characters")
        if not isinstance(box, list) or [type(one) in (int, float) for one in box] != [True] * 4:
            raise ValueError("boxes of four numbers, (x0, y0, x1, y1)")
        x0, y0, x1, y1 = (float(one) for one in box)
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError("boxes within 0 to 1, with x0 < x1 and y0 < y1")
        found.append((phrase, (x0, y0, x1, y1)))
    return tuple(found)
