"""Selects the settings to report: those that apply, and those that differ from their default."""

from __future__ import annotations

import os
from typing import Any

from batchgen.plan.plan import Plan
from batchgen.spec.approximate import METHODS, UNMEASURED
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import task_named


def applying(plan: Plan) -> dict[str, Any]:
    """The settings of a call that this task and model support and that have a value."""
    parts = task_named(plan.spec.task).parts
    values = plan.spec.sampling.model_dump(mode="json")
    if "strength" not in plan.model.settings:
        values["strength"] = None
    return {
        name: value
        for name, value in values.items()
        if value not in (None, "") and _applies(name, parts, plan.model.settings)
    }


def _applies(name: str, parts: tuple[str, ...], taken: tuple[str, ...]) -> bool:
    if name in ("width", "height", "num_inference_steps"):
        return True
    if name in ("negative_prompt", "guidance_scale", "strength", "lora"):
        return name in parts
    return name in taken


def approximations(spec: Spec) -> dict[str, str]:
    """Each approximate mode that is on -> its paper; its cost -> what was measured."""
    told = {}
    for name, label in spec.sampling.approximate.labels.items():
        told[f"approximate: {label}"] = METHODS[name].paper
        told[f"measured cost of {name}"] = METHODS[name].measured or UNMEASURED
    return told


def differing(spec: Spec) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(field, value) pairs: those that the user or the model changed, and all others."""
    least = build({"input": {"path": "x"}, "output": {"url": "x"}}).result_fields()
    fields = sorted(spec.result_fields().items())
    changed = [(name, value) for name, value in fields if least.get(name, value) != value]
    changed += [(name, value) for name, value in fields if name not in least]
    return changed, [one for one in fields if one not in changed]


def model_name(model_id: str) -> str:
    """A model's name for others to read: of a folder on this machine only the last part."""
    if os.path.isabs(model_id) or model_id.startswith((".", "~", "file:")):
        return os.path.basename(os.path.normpath(model_id.removeprefix("file:")))
    return model_id
