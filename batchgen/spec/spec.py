"""The spec: what the user asked for in YAML and flags, validated, frozen, with a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from batchgen.errors import nearest
from batchgen.spec.checks import refusals
from batchgen.spec.faults import Faults
from batchgen.spec.labels_section import FROM_LABELS, Labels
from batchgen.spec.model import AUTO, COUNTED_IF_SET, FREE, Model, Section, counted
from batchgen.spec.quota_section import Quota
from batchgen.spec.score_section import ScorerSpec
from batchgen.spec.sections import (
    Conditioning,
    Input,
    Made,
    Output,
    Policy,
    Resources,
    Sampling,
    Seed,
)
from batchgen.spec.storage_section import Storage, option_faults
from batchgen.spec.tasks import TASK_NAMES, is_image, task_named
from batchgen.spec.tree import canonical_json, flatten, spread

STORED = "stored"  # validation context of a spec read from an output: fewer checks, see checks.py


class Spec(Section):
    """The complete spec. Two specs with equal fingerprints give the same images."""

    input: Input
    task: str = "text-to-image"
    model: Model = Model()
    sampling: Sampling = Sampling()
    conditioning: Conditioning = Conditioning()
    labels: Labels = Labels()
    score: Annotated[tuple[ScorerSpec, ...], COUNTED_IF_SET] = Field(
        default=(), description="scorers of the images, which fill columns of the output"
    )
    variants: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    seed: Seed = 0
    output: Output
    resources: Resources = Resources()
    policy: Policy = Policy()
    quota: Annotated[Quota | None, FREE] = Field(
        default=None, description="accepted samples that each group needs, in rounds"
    )
    storage: Annotated[Storage, FREE] = Storage()
    storage_options: Annotated[dict[str, dict[str, Any]], FREE] = Field(
        default={}, description="protocol -> options of its fsspec package"
    )

    @field_validator("storage_options", mode="before")
    @classmethod
    def _secrets_by_name(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return {}
        faults = [] if info.context == STORED else list(option_faults(value))
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
        """Expand sections written as a text; add the prompt column of tasks that read prompts."""
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
        faults = list(refusals(self, stored=info.context == STORED))
        if faults:
            raise Faults(faults)
        return self

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers of this job. What is added to every job changes every output."""
        return ("pixel-statistics",)

    @property
    def has_labels(self) -> bool:
        """Whether the rows have labels that follow the pixels: objects or label masks."""
        columns = self.input.columns
        return columns.objects is not None or columns.label_mask is not None

    @property
    def drawn(self) -> dict[str, Made]:
        """Part -> the maker that draws it from the row's labels."""
        return {
            part: made for part, made in self.conditioning.make.items() if made.name in FROM_LABELS
        }

    @property
    def image_parts(self) -> tuple[str, ...]:
        """The parts of a row that are images, read from a column or drawn from labels."""
        parts = (*self.input.columns.mapped(), *self.drawn)
        return tuple(part for part in parts if is_image(part))

    @property
    def open_fields(self) -> tuple[str, ...]:
        """Names of fields that are ``auto``; none in a plan, since planning chooses the values."""
        fields = {
            "model.dtype": self.model.dtype,
            "resources.batch_size": self.resources.batch_size,
        }
        return tuple(name for name, value in fields.items() if value == AUTO)

    def result_fields(self) -> dict[str, Any]:
        """Return the fields that change the images, by dotted name; others may differ on resume."""
        return result_fields(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ``result_fields``. That of a plan is computed without any ``auto``."""
        return spec_fingerprint(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
        return text


def result_fields(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that change the images, of a spec that another version may have written.

    The fingerprints of existing outputs are computed over them, so a field that is part of the
    fingerprint must stay part of it.
    """
    return flatten(counted(Spec, whole))


def spec_fingerprint(whole: Mapping[str, Any]) -> str:
    """Hash (SHA-256) the ``result_fields`` of a spec, as another version may have written it."""
    return hashlib.sha256(canonical_json(result_fields(whole)).encode()).hexdigest()
