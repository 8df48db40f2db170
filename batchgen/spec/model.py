"""The section ``model`` of the spec: the model, its adapters (such as LoRAs), its quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from batchgen.spec.tasks import MAX_LORA_WEIGHT

Weight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
OptionValue = bool | int | float | str | tuple[float, ...] | None
INT8_MATMUL = "Int8DynamicActivationInt8WeightConfig"
FLOAT8_MATMUL = "Float8DynamicActivationFloat8WeightConfig"
QuantizationOption = bool | int | float | str | tuple[str, ...] | None


class FreeOnResume:
    """Marks a field that does not change the images, so a resume may change its value.

    Every field without this mark is part of the spec's fingerprint.
    """


FREE = FreeOnResume()
AUTO: Final = "auto"  # the value is chosen while planning, for the device that the job runs on


class CountedIfSet:
    """Marks a field that an earlier version lacked: at its default it is not in the fingerprint.

    So a spec without it has the fingerprint that earlier versions computed.
    """


COUNTED_IF_SET = CountedIfSet()


@dataclass(frozen=True)
class NotCounted:
    """Marks a field that is not in the fingerprint if it has one of these values.

    For a field whose default is new: plans of earlier versions do as one of these values says.
    """

    values: tuple[object, ...]


@dataclass(frozen=True)
class OnlyWith:
    """Marks a field that has an effect only with some values of another field of its section."""

    field: str
    values: tuple[str, ...]


class Section(BaseModel):
    """Base class of the spec's sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        """A section that is empty in the file has its defaults."""
        return {} if value is None else value


def _is_free(field: FieldInfo, value: object) -> bool:
    """Whether a field with this value is left out of the fingerprint."""
    for mark in field.metadata:
        if isinstance(mark, NotCounted):
            return value in mark.values
    if any(isinstance(mark, CountedIfSet) for mark in field.metadata):
        return bool(_as_in_json(value) == _as_in_json(field.default))
    return any(isinstance(mark, FreeOnResume) for mark in field.metadata)


def _as_in_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def counted(section: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of a section that change images; another version may have written it.

    Fields that this version does not know are selected as well.
    """
    kept = {}
    for name, value in tree.items():
        field = section.model_fields.get(name)
        if field is not None and _is_free(field, value):
            continue
        inner = None if field is None else _section_in(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            value = counted(inner, value)
        kept[name] = value
    return kept


def _section_in(kind: Any) -> type[Section] | None:
    """The section that a field's type is, or that it is if it is not null."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, Section)), None)


class Added(Section):
    """A file that is loaded into the model: a LoRA, a textual inversion or an IP-Adapter."""

    path: str = Field(description="a safetensors file, a folder that holds one, a hub id or a URL")
    weight_name: str | None = Field(
        default=None, description="the file's name, if the folder or repository has several"
    )
    revision: str | None = Field(default=None, description="revision, if the path is a hub id")


class Lora(Added):
    """A LoRA. Rows choose it by its name (column ``lora``)."""

    name: Name
    weight: Weight = Field(default=1.0, description="used if a row names the LoRA without a weight")


class TextualInversion(Added):
    """Learned embeddings of a token, which prompts may then use."""

    token: str | None = Field(default=None, description="null: the token that the file names")


class IpAdapter(Added):
    """Weights that let a text-to-image model take an image as its prompt (task variation)."""

    subfolder: str = Field(default="", description="folder of the file under the path")
    image_encoder: str = Field(
        default="image_encoder",
        description="folder of the image encoder under the subfolder; with a / in it, under the "
        "path; used only if neither the model nor model.components has an image encoder",
    )


class Quantization(Section):
    """Weights are quantized while the model is loaded, by a library that diffusers supports."""

    backend: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "quanto", "torchao"]
    components: tuple[str, ...] = Field(
        min_length=1, description="components to quantize, such as unet, text_encoder"
    )
    options: dict[str, QuantizationOption] = Field(
        default={}, description="options of the backend's configuration class in diffusers"
    )

    @property
    def multiplies_float8(self) -> bool:
        """Whether matrices are multiplied in float8, which only some GPUs can do."""
        return self.options.get("quant_type") == FLOAT8_MATMUL


class Model(Section):
    """Which model to use: the shipped one by name, a folder, a URL, or a hub id and revision."""

    path: str = "digits-shapes"
    config: str | None = Field(
        default=None,
        description="if the path is a single safetensors file: the folder, hub id or URL of a "
        "model in diffusers layout, from which everything except the weights is read",
    )
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = Field(
        default=False,
        description="load weights that exist only as .bin, by torch.load with weights_only",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default=AUTO,
        description="auto: bfloat16 on GPUs that have it, float16 on older ones, float32 on CPUs",
    )
    scheduler: str | None = Field(
        default=None, description="a diffusers scheduler class; null: the model's own"
    )
    scheduler_options: dict[str, OptionValue] = Field(
        default={},
        description="options for the scheduler, and for schedulers named by rows that have them",
    )
    components: dict[str, str | tuple[str, ...]] = Field(
        default={},
        description="component -> folder, hub id or URL to load it from, or several (ControlNets)",
    )
    loras: tuple[Lora, ...] = Field(default=(), description="LoRA files that rows choose from")
    textual_inversions: tuple[TextualInversion, ...] = Field(
        default=(), description="learned tokens that prompts may use"
    )
    ip_adapter: IpAdapter | None = Field(
        default=None, description="for task variation: lets a text model take an image as prompt"
    )
    quantization: Quantization | None = Field(
        default=None, description="load components with quantized weights"
    )
    prompt_weighting: Literal["compel"] | None = Field(
        default=None, description="compel: prompts may weight words, as in (red)1.5 star"
    )

    @model_validator(mode="after")
    def _names_once(self) -> Model:
        names = [lora.name for lora in self.loras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"loras with different names ({', '.join(twice)} is used twice)")
        return self

    @property
    def lora_weights(self) -> dict[str, float]:
        """Name -> the weight to use if a row gives none."""
        return {lora.name: lora.weight for lora in self.loras}

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield every path, hub id or URL with the field that names it."""
        yield "model.path", self.path
        if self.config is not None:
            yield "model.config", self.config
        for name, given in self.components.items():
            for place in (given,) if isinstance(given, str) else given:
                yield f"model.components.{name}", place
        for field, added in self.added():
            yield f"{field}.path", added.path

    def added(self) -> Iterator[tuple[str, Added]]:
        """Yield every adapter file (LoRA and so on) with the field that names it."""
        for number, lora in enumerate(self.loras):
            yield f"model.loras.{number}", lora
        for number, inversion in enumerate(self.textual_inversions):
            yield f"model.textual_inversions.{number}", inversion
        if self.ip_adapter is not None:
            yield "model.ip_adapter", self.ip_adapter
