"""For every family a spec that runs on its tiny model and the drawn input of `jobs/tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchgen import models
from batchgen.families import FAMILIES, Family
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import task_named

LARGEST = 64  # pixels a side, of models whose configuration tells no size
FAMILY_IDS = [f"{family.task}-{family.name}" for family in FAMILIES]


def model_fields(family: Family, folder: Path) -> dict[str, Any]:
    """The section ``model`` for a tiny model that ``make-tiny`` wrote."""
    fields: dict[str, Any] = {"path": str(folder), "dtype": "float32"}
    if family.name.startswith("ip-adapter"):
        fields["ip_adapter"] = {"path": str(folder / "ip_adapter")}
    if (folder / "refiner").is_dir():
        fields["components"] = {"refiner": str(folder / "refiner")}
    return fields


def family_spec(family: Family, folder: Path, rows: Path, output: Path, **resources: Any) -> Spec:
    """Every image that the family reads, mapped; few steps; two samples a row."""
    model = model_fields(family, folder)
    whole: dict[str, Any] = {
        "task": family.task,
        "input": {"path": str(rows), "columns": {}, "limit": 3, "keep_columns": []},
        "model": model,
        "sampling": {"num_inference_steps": 3},
        "variants": 2,
        "output": {"url": str(output), "samples_per_shard": 4},
        "resources": {"batch_size": 2, **resources},
    }
    columns = {part: part for part in task_named(family.task).needs}
    columns["prompt"] = "prompt" if "prompt" in task_named(family.task).parts else None
    columns |= {"image": "small"} if family.task == "super-resolution" else {}
    columns |= {part: part for part in family.needs}
    columns |= {"regions": "regions"} if "regions" in family.settings else {}
    whole["input"]["columns"] = {k: v for k, v in columns.items() if k != "prompt" or v}
    info = models.inspect(build_model(model), family.task)
    if info.width > LARGEST:
        side = max(LARGEST, info.multiple_of)
        whole["sampling"] |= {"width": side, "height": side}
    whole["sampling"]["num_inference_steps"] = max(3, info.min_steps)
    if info.controls:
        whole["input"]["columns"]["control"] = ["image"] * info.controls
    return build(whole)


def build_model(fields: dict[str, Any]) -> Any:
    from batchgen.spec.model import Model

    return Model.model_validate(fields)
