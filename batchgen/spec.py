"""What the user asked for: YAML, flags or both become one frozen spec with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from batchgen.errors import InputError, SpecError, nearest
from batchgen.model_spec import Lora as Lora
from batchgen.model_spec import Model as Model
from batchgen.model_spec import Section as Section
from batchgen.tasks import TASK_NAMES, is_image, parse_lora, task_named

MAX_SIZE = 4096
_USERINFO = re.compile(r"^([A-Za-z0-9+.-]+://)[^/@]*@")

Label = Annotated[int, Field(ge=0)]
Eta = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Noise = Annotated[int, Field(ge=0, le=1000)]
Scale = Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)]

Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
Strength = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=8, le=MAX_SIZE, multiple_of=8)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Part = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Columns(Section):
    """Which input column plays which part. A null part is not read from the data."""

    prompt: str | None = Field(
        default=None, description="default: `prompt`, for the tasks that need one"
    )
    negative_prompt: str | None = None
    class_label: str | None = Field(default=None, description="class numbers or names")
    image: str | None = None
    mask: str | None = Field(default=None, description="white is repainted")
    control: str | tuple[str, ...] | None = Field(
        default=None, description="control images, a column for each ControlNet"
    )
    regions: str | None = Field(default=None, description="lists of {phrase, box} for layouts")
    key: str | None = None
    label: str | None = None
    seed: str | None = None
    num_inference_steps: str | None = None
    guidance_scale: str | None = None
    strength: str | None = None
    width: str | None = None
    height: str | None = None
    eta: str | None = None
    image_guidance_scale: str | None = None
    noise_level: str | None = None
    control_scale: str | None = None
    image_prompt_scale: str | None = None
    scheduler: str | None = None
    lora: str | None = Field(default=None, description="`name:weight,name:weight`, or empty")

    def mapped(self) -> dict[str, str]:
        """Part -> column for the parts that are read from the data.

        Of several control images the first is ``control``, the next ``control_1`` and so on.
        """
        parts = {part: getattr(self, part) for part in type(self).model_fields}
        several = parts.pop("control")
        controls = (several,) if isinstance(several, str) else several or ()
        parts |= {control_part(number): column for number, column in enumerate(controls)}
        return {part: column for part, column in parts.items() if column is not None}


def control_part(number: int) -> str:
    """The part that the control image of that number plays."""
    return f"control_{number}" if number else "control"


class Input(Section):
    """Where the rows come from: a Parquet file, a folder of them or a glob, on any fsspec URL."""

    path: str = ""
    count: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="instead of a path: so many rows that carry nothing"
    )
    columns: Columns = Columns()
    keep_columns: tuple[str, ...] | None = Field(
        default=None,
        description="source columns copied to the output; null: all but the conditioning image",
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="only the first rows of the dataset"
    )
    check_keys: bool = Field(
        default=True, description="read the key column while planning and refuse duplicates"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Input:
        if not self.path and self.count is None:
            raise SpecError("input.path", None, "a value is required (flag --input)")
        if self.path and self.count is not None:
            raise SpecError("input.count", self.count, "null where input.path is given")
        mapped = self.columns.mapped()
        if self.count is not None and mapped:
            part, column = next(iter(mapped.items()))
            raise SpecError(f"input.columns.{part}", column, "null: input.count has no columns")
        return self


class Sampling(Section):
    """Defaults for every sample; a mapped column overrides them row by row.

    Nulls are filled from the model when the plan is made (its recommended settings, its size).
    """

    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    strength: Strength | None = None
    width: Size | None = None
    height: Size | None = None
    negative_prompt: str = ""
    eta: Eta = Field(default=0.0, description="share of fresh noise in DDIM")
    image_guidance_scale: Guidance = Field(default=1.5, description="image-edit: towards the image")
    noise_level: Noise | None = Field(
        default=None, description="noise added to the condition; null: the pipeline's default"
    )
    control_scale: Scale | tuple[Scale, ...] = Field(
        default=1.0, description="weight of the control images, one for all or one for each"
    )
    image_prompt_scale: Scale = Field(default=1.0, description="weight of an image prompt")
    denoising_end: Part = Field(
        default=0.8, description="with a refiner: share of the schedule that the base model goes"
    )
    lora: str | None = Field(
        default=None, description="`name:weight,...` of model.loras; null: all, at their weights"
    )


class Made(Section):
    """A condition made on the fly from an image, by a classical method (``batchgen tasks``)."""

    name: str
    options: dict[str, float] = {}

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class Conditioning(Section):
    """How conditioning images are brought to the size of the call, and what is made of them."""

    resize: Literal["fill", "fit", "stretch", "multiple-of"] = Field(
        default="fill",
        description="fill: cover, crop about the centre; fit: lie inside, pad; stretch: regardless "
        "of aspect; multiple-of: each image keeps its size, cropped to what the model can take",
    )
    make: dict[str, Made] = Field(
        default={}, description="part (image, control, control_1, ...) -> what is made of its image"
    )


class Output(Section):
    """Where the images go and in which form."""

    url: str
    format: Literal["parquet"] = "parquet"
    samples_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 64
    image_format: Literal["png", "jpeg", "webp"] = "png"
    image_quality: Annotated[int, Field(ge=1, le=100)] = 95
    license: str = "unknown"


class Pool(Section):
    """The replicas of one stage. Null shares are chosen from what the cluster has."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    num_cpus: Annotated[float, Field(gt=0)] | None = None
    num_gpus: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas of at least min_replicas ({self.min_replicas})")
        return self


class Resources(Section):
    """How the stages are laid out over actors.

    ``batch_size`` and ``torch_threads`` are part of the fingerprint: a sample's bytes are promised
    for a fixed batch shape and thread count.
    """

    layout: Literal["fused", "staged"] = "fused"
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    torch_threads: Annotated[int, Field(ge=1, le=256)] = 1
    shards_in_flight: Annotated[int, Field(ge=1, le=8)] = Field(
        default=2, description="shards one actor holds at a time, to overlap device and upload"
    )
    generate: Pool = Pool()
    encode: Pool = Pool()
    denoise: Pool = Pool()
    decode: Pool = Pool()


class Policy(Section):
    """When to go on and when to stop."""

    failed_limit: Share = Field(
        default=0.01, description="share of the finished samples that may fail"
    )
    rejected_limit: Share = Field(
        default=0.1, description="share of planned samples that may be rejected"
    )
    shard_retries: Annotated[int, Field(ge=0, le=100)] = 2
    reject_flat: bool = Field(default=True, description="reject images of one single colour")


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

    @model_validator(mode="after")
    def _no_secrets_in_urls(self) -> Spec:
        urls = {"input.path": self.input.path, "output.url": self.output.url}
        urls |= {f"{field}.path": added.path for field, added in self.model.added()}
        for field, url in {**urls, "model.path": self.model.path}.items():
            if _USERINFO.match(url):
                raise SpecError(field, _USERINFO.sub(r"\1...@", url), "a URL without credentials")
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
        whole = self.model_dump(mode="json")
        kept: dict[str, Any] = {
            "input": {
                key: whole["input"][key]
                for key in ("path", "count", "columns", "keep_columns", "limit")
            },
            "task": whole["task"],
            "model": whole["model"],
            "sampling": whole["sampling"],
            "conditioning": whole["conditioning"],
            "variants": whole["variants"],
            "seed": whole["seed"],
            "output": {
                key: whole["output"][key]
                for key in ("format", "samples_per_shard", "image_format", "image_quality")
            },
            "resources": {key: whole["resources"][key] for key in ("batch_size", "torch_threads")},
            "policy": {"reject_flat": whole["policy"]["reject_flat"]},
        }
        return flatten(kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ``result_fields``."""
        return hashlib.sha256(canonical_json(self.result_fields()).encode()).hexdigest()

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
        return text


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
