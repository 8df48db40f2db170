"""What the user asked for: YAML, flags or both become one frozen spec with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from batchgen.errors import InputError, SpecError, nearest
from batchgen.model_spec import Lora, Model, Section
from batchgen.spec.sections import (
    MAX_SIZE,
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
from batchgen.spec.storage_section import Storage, check_options
from batchgen.tasks import TASK_NAMES, is_image, parse_lora, task_named

__all__ = [
    "MAX_SIZE",
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
    "flatten",
    "merge",
    "read_yaml",
    "result_fields",
]

_USERINFO = re.compile(r"^([A-Za-z0-9+.-]+://)[^/@]*@")
_SIGNED = re.compile(
    r"[?&](x-(amz|goog)-(signature|credential|security-token)|sig|[a-z_]*(signature|token|key)"
    r"|awsaccesskeyid)=",
    re.IGNORECASE,
)


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
    def _secrets_by_name(cls, value: object) -> object:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise SpecError("storage_options", "(hidden)", "options by protocol")
        check_options(value)
        return value

    @model_validator(mode="after")
    def _no_secrets_in_urls(self) -> Spec:
        urls = [("input.path", self.input.path), ("output.url", self.output.url)]
        for field, url in (*urls, *self.model.places()):
            if _USERINFO.match(url):
                raise SpecError(field, _USERINFO.sub(r"\1...@", url), "a URL without credentials")
            if "://" in url and _SIGNED.search(url):
                shown = f"{url.partition('?')[0]}?..."
                raise SpecError(field, shown, "a URL without credentials, which would be kept")
        return self

    @field_validator("task", mode="before")
    @classmethod
    def _task_name(cls, value: object) -> object:
        name = value.replace("_", "-") if isinstance(value, str) else value
        if name not in TASK_NAMES:
            hint = nearest(str(name), TASK_NAMES)
            raise SpecError("task", value, f"{', '.join(TASK_NAMES)}{hint}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _prompt_column(cls, tree: Any) -> Any:
        """Tasks that need a prompt find it in the column ``prompt``, if none is named."""
        if not isinstance(tree, dict) or not isinstance(tree.get("input"), dict):
            return tree
        columns = tree["input"].get("columns") or {}
        name = str(tree.get("task", "text-to-image")).replace("_", "-")
        if name not in TASK_NAMES or not isinstance(columns, dict) or "prompt" in columns:
            return tree
        columns = {**columns, "prompt": task_named(name).prompt_column}
        return {**tree, "input": {**tree["input"], "columns": columns}}

    @model_validator(mode="after")
    def _columns_fit_the_task(self) -> Spec:
        task, columns = task_named(self.task), self.input.columns
        mapped = columns.mapped()
        for part in self.conditioning.make:
            allowed = [name for name in mapped if is_image(name) and name != "mask"]
            if part not in allowed:
                named = ", ".join(allowed) or "none"
                raise SpecError("conditioning.make", part, f"mapped image parts: {named}")
        for part in type(columns).model_fields:
            column = getattr(columns, part)
            if column is None and part in task.needs:
                raise SpecError(f"input.columns.{part}", None, f"a column, for {self.task}")
            if column is not None and part not in task.parts:
                raise SpecError(f"input.columns.{part}", column, f"null, for {self.task}")
        return self

    @model_validator(mode="after")
    def _loras_are_known(self) -> Spec:
        try:
            parse_lora(self.sampling.lora or "", self.model.lora_weights)
        except ValueError as error:
            raise SpecError("sampling.lora", self.sampling.lora, str(error)) from error
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
    kept: dict[str, Any] = {
        section: {
            name: value for name, value in (whole.get(section) or {}).items() if name in names
        }
        for section, names in named.items()
    }
    for section in ("task", "model", "sampling", "conditioning", "variants", "seed"):
        if section in whole:
            kept[section] = whole[section]
    return flatten(kept)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: str) -> dict[str, Any]:
    """A spec file as nested dictionaries.

    Raises:
        InputError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"spec file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"spec file {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"spec file {path}: expected sections such as input: and output:")
    return tree


def merge(base: dict[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with every dotted path set to its value; the later wins."""
    merged: dict[str, Any] = json.loads(json.dumps(base, default=str))
    for path, value in dotted.items():
        *sections, field = path.split(".")
        place = merged
        for depth, section in enumerate(sections, start=1):
            inner = place.get(section)
            if inner is None:
                inner = place[section] = {}
            if not isinstance(inner, dict):
                outer = ".".join(sections[:depth])
                raise SpecError(outer, inner, f"a section that holds {path!r}")
            place = inner
        place[field] = value
    return merged


def build(tree: dict[str, Any]) -> Spec:
    """Validate a nested dictionary into a spec.

    Raises:
        SpecError: for the first field that is wrong: its dotted name, value and what is allowed.
    """
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError) -> SpecError:
    detail = error.errors()[0]
    path = [str(part) for part in detail["loc"]]
    field = ".".join(path) or "spec"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        return SpecError(field, detail["input"], f"{', '.join(known)}{nearest(path[-1], known)}")
    if detail["type"] == "missing":
        return SpecError(field, None, "a value is required" + _flag_hint(field))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    context = detail.get("ctx") or {}
    if detail["type"] == "literal_error":
        return SpecError(field, detail["input"], str(context["expected"]))
    return SpecError(field, detail["input"], message)


def _flag_hint(field: str) -> str:
    section = field.split(".", 1)[0]
    flag = {"input": "--input", "output": "--output"}.get(section)
    return f" (flag {flag})" if flag else ""


def _fields_at(path: list[str]) -> list[str]:
    """The fields of the section there; a list's sections stand under their numbers."""
    model: type[BaseModel] = Spec
    for part in path:
        if part.isdecimal():
            continue
        annotation = model.model_fields[part].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if section is None:
            break
        model = section
    return list(model.model_fields)
