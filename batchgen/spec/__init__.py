"""What the user asked for: YAML, flags or both become one frozen spec with a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from batchgen.errors import SpecError, nearest
from batchgen.model_spec import Lora, Model, Section
from batchgen.spec.checks import is_set, refusals
from batchgen.spec.faults import Faults, described, faults_of
from batchgen.spec.sections import (
    MAX_SIZE,
    MAX_TEXT,
    MIN_SIZE,
    Columns,
    Conditioning,
    Eta,
    Guidance,
    Input,
    Made,
    Noise,
    Output,
    Part,
    Policy,
    Pool,
    Resources,
    Sampling,
    Scale,
    Seed,
    Share,
    Size,
    Steps,
    Strength,
)
from batchgen.spec.storage_section import Storage, check_options, option_faults
from batchgen.spec.tree import (
    canonical_json,
    flatten,
    merge,
    read_yaml,
    spread,
    unreadable,
    without,
)
from batchgen.spec.yaml_text import parse_yaml
from batchgen.tasks import TASK_NAMES, task_named

__all__ = [
    "MAX_SIZE",
    "MAX_TEXT",
    "MIN_SIZE",
    "Columns",
    "Conditioning",
    "Eta",
    "Guidance",
    "Input",
    "Lora",
    "Made",
    "Model",
    "Noise",
    "Output",
    "Part",
    "Policy",
    "Pool",
    "Resources",
    "Sampling",
    "Scale",
    "Section",
    "Seed",
    "Share",
    "Size",
    "Spec",
    "Steps",
    "Storage",
    "Strength",
    "build",
    "canonical_json",
    "check_options",
    "described_kind",
    "flatten",
    "is_set",
    "merge",
    "parse_yaml",
    "read_yaml",
    "result_fields",
    "stored",
]


class Spec(Section):
    """The whole order. Two specs with equal fingerprints give the same images."""

    input: Input
    task: str = "text-to-image"
    model: Model = Model()
    sampling: Sampling = Sampling()
    conditioning: Conditioning = Conditioning()
    variants: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    seed: Seed = 0
    output: Output
    resources: Resources = Resources()
    policy: Policy = Policy()
    storage: Storage = Storage()
    storage_options: dict[str, dict[str, Any]] = Field(
        default={}, description="protocol -> options of its fsspec package"
    )

    @field_validator("storage_options", mode="before")
    @classmethod
    def _secrets_by_name(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return {}
        faults = [] if info.context == _STORED else list(option_faults(value))
        if faults:
            raise Faults(faults)
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _task_name(cls, value: object) -> object:
        name = value.replace("_", "-") if isinstance(value, str) else value
        if name not in TASK_NAMES:
            raise ValueError(f"{', '.join(TASK_NAMES)}{nearest(str(name), TASK_NAMES)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, tree: Any) -> Any:
        """Sections written as a text; ``prompt`` is the column of tasks that need a prompt."""
        if not isinstance(tree, dict):
            return tree
        tree = spread(tree)
        if not isinstance(tree.get("input"), dict):
            return tree
        columns = tree["input"].get("columns") or {}
        name = str(tree.get("task", "text-to-image")).replace("_", "-")
        if name not in TASK_NAMES or not isinstance(columns, dict) or "prompt" in columns:
            return tree
        columns = {**columns, "prompt": task_named(name).prompt_column}
        return {**tree, "input": {**tree["input"], "columns": columns}}

    @model_validator(mode="after")
    def _goes_together(self, info: ValidationInfo) -> Spec:
        faults = list(refusals(self, stored=info.context == _STORED))
        if faults:
            raise Faults(faults)
        return self

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the images, dotted; everything else may differ on resume."""
        return result_fields(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ``result_fields``."""
        return hashlib.sha256(canonical_json(self.result_fields()).encode()).hexdigest()

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
        return text


def result_fields(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Of a spec as it is written, perhaps by another version, the fields that change the images.

    What is named here stays: the fingerprints of outputs are reckoned over it.
    """
    named = {
        "input": (
            *("path", "count", "columns", "keep_columns", "limit"),
            *("uri_roots", "uri_limit_bytes"),
        ),
        "output": (
            *("format", "samples_per_shard"),
            *("image_format", "image_quality", "jpeg_subsampling"),
        ),
        "resources": ("batch_size", "torch_threads"),
        "policy": ("reject_flat",),
    }
    kept: dict[str, Any] = {}
    for section, names in named.items():
        fields = whole.get(section)
        fields = fields if isinstance(fields, Mapping) else {}  # damaged: no fingerprint fits
        kept[section] = {name: value for name, value in fields.items() if name in names}
    for section in ("task", "model", "sampling", "conditioning", "variants", "seed"):
        if section in whole:
            kept[section] = whole[section]
    return flatten(kept)


_STORED = "stored"  # context of a spec that stands in an output already, and is taken as it is


def build(tree: Mapping[str, Any]) -> Spec:
    """Validate a nested dictionary into a spec.

    Raises:
        SpecError: every field that is wrong, a line each: its dotted name, what was given and what
            is allowed.
    """
    faults = _all_faults(dict(tree))
    if faults:
        raise faults[0].beside(faults[1:])
    return Spec.model_validate(tree)


def stored(tree: Mapping[str, Any], **how: Any) -> Spec:
    """A spec that stands in an output, perhaps of an earlier version that asked for less.

    Raises:
        SpecError: it is none.
    """
    try:
        return Spec.model_validate(tree, context=_STORED, **how)
    except ValidationError as error:
        first, *others = faults_of(error, _schema())
        raise first.beside(others) from None


def described_kind(kind: Any) -> str:
    """What a pydantic adapter takes, in words."""
    schema = kind.json_schema()
    return described(schema, schema)


def _all_faults(tree: dict[str, Any]) -> list[SpecError]:
    """Those of the fields, and those between the fields that are left when they are taken out."""
    found = {fault.field: fault for fault in unreadable(tree)}
    kept = spread(tree)
    fresh = list(found.values())
    while "task" not in found:  # without the task, nothing is known of what goes with it
        for fault in fresh:
            kept = without(kept, fault.field)
        try:
            Spec.model_validate(kept)
            break
        except ValidationError as error:
            fresh = [one for one in faults_of(error, _schema()) if not _is_told(one.field, found)]
        if not fresh:
            break
        found.update({fault.field: fault for fault in fresh})
    return list(found.values())


def _is_told(field: str, found: Mapping[str, SpecError]) -> bool:
    """It is the same fault, or follows from one: without its count a spec has no input."""
    if field == "input.path" and "input.count" in found:
        return True
    return any(f"{field}.".startswith(f"{one}.") or one.startswith(f"{field}.") for one in found)


@cache
def _schema() -> dict[str, Any]:
    return Spec.model_json_schema()
