"""The section ``model`` of the spec: the model, and what is added to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchgen.spec.tasks import MAX_LORA_WEIGHT

Weight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Option = bool | int | float | str | tuple[float, ...] | None
QuantizationOption = bool | int | float | str | tuple[str, ...] | None


class FreeOnResume:
    """Marks a field that changes no image: a resume may give it another value.

    Every field without this mark is part of the spec's fingerprint.
    """


FREE = FreeOnResume()


class Section(BaseModel):
    """A frozen part of the spec that knows its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        """A section that stands in the file with nothing under it has its defaults."""
        return {} if value is None else value


def counted(section: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of a section as it is written, perhaps by another version, the fields that change images.

    What this version does not know is counted.
    """
    kept = {}
    for name, value in tree.items():
        field = section.model_fields.get(name)
        if field is not None and any(isinstance(one, FreeOnResume) for one in field.metadata):
            continue
        kind = None if field is None else field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, Mapping):
            value = counted(kind, value)
        kept[name] = value
    return kept


class Added(Section):
    """A file that is added to the model."""

    path: str = Field(description="a safetensors file, a folder that holds one, a hub id or a URL")
    weight_name: str | None = Field(
        default=None, description="the file's name, where a folder or repository has several"
    )
    revision: str | None = Field(default=None, description="of a hub id")


class Lora(Added):
    """A LoRA, chosen row by row by its name (column ``lora``)."""

    name: Name
    weight: Weight = Field(default=1.0, description="where a row names the LoRA without a weight")


class TextualInversion(Added):
    """Learned embeddings of a token that prompts then may use."""

    token: str | None = Field(default=None, description="null: the one that the file names")


class IpAdapter(Added):
    """Weights that let a text-to-image model take an image as its prompt (task variation)."""

    subfolder: str = Field(default="", description="where the file lies under the path")
    image_encoder: str = Field(
        default="image_encoder",
        description="folder of the image encoder under the subfolder; with a / in it, under the "
        "path; read only where the model has none itself and model.components names none",
    )


class Quantization(Section):
    """Weights of fewer bits, made by a library that diffusers knows while the model is loaded."""

    backend: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "quanto", "torchao"]
    components: tuple[str, ...] = Field(
        min_length=1, description="those whose layers become quantised, such as unet, text_encoder"
    )
    options: dict[str, QuantizationOption] = Field(
        default={}, description="of the backend's configuration, as diffusers has it"
    )


class Model(Section):
    """Which model: the shipped one by name, a folder, a URL, or a hub id with its revision."""

    path: str = "digits-shapes"
    config: str | None = Field(
        default=None,
        description="with a single safetensors file as the path: the folder, hub id or URL of a "
        "model in diffusers layout, of which all but the weights is taken",
    )
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = Field(
        default=False,
        description="load weights that are there as .bin alone, by torch.load with weights_only",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    scheduler: str | None = Field(
        default=None, description="a diffusers scheduler class; null: the model's own"
    )
    scheduler_options: dict[str, Option] = Field(
        default={},
        description="given to the scheduler, and to those that rows name where they know them",
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
        default=None, description="for task variation: an image as the prompt of a text model"
    )
    quantization: Quantization | None = Field(
        default=None, description="load components with weights of fewer bits"
    )
    prompt_weighting: Literal["compel"] | None = Field(
        default=None, description="compel: (red)1.5 and the like in prompts give words a weight"
    )

    @model_validator(mode="after")
    def _names_once(self) -> Model:
        names = [lora.name for lora in self.loras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each name of loras once ({', '.join(twice)} stands there twice)")
        return self

    @property
    def lora_weights(self) -> dict[str, float]:
        """Name -> the weight where a row gives none."""
        return {lora.name: lora.weight for lora in self.loras}

    def places(self) -> Iterator[tuple[str, str]]:
        """Every path, hub id or URL with the field that names it."""
        yield "model.path", self.path
        if self.config is not None:
            yield "model.config", self.config
        for name, given in self.components.items():
            for place in (given,) if isinstance(given, str) else given:
                yield f"model.components.{name}", place
        for field, added in self.added():
            yield f"{field}.path", added.path

    def added(self) -> Iterator[tuple[str, Added]]:
        """Every added file with the field that names it."""
        for number, lora in enumerate(self.loras):
            yield f"model.loras.{number}", lora
        for number, inversion in enumerate(self.textual_inversions):
            yield f"model.textual_inversions.{number}", inversion
        if self.ip_adapter is not None:
            yield "model.ip_adapter", self.ip_adapter
