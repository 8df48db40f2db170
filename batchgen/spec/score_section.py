"""The field ``score`` of the spec: scorers by name, with their models and their options."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from batchgen.errors import SpecError, nearest
from batchgen.spec.faults import Faults, faults_of
from batchgen.spec.model import Section
from batchgen.spec.yaml_text import parse_yaml

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a user's own scorer, as module:function
ENTRY_POINTS = "batchgen.scorers"  # group of entry points of installed packages
FORM = "NAME, NAME=MODEL or {scorer: NAME, ...}"
Classes = tuple[str, ...] | dict[str, str] | None
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=0.0, le=255.0, allow_inf_nan=False)]


class NoOptions(Section):
    """A scorer without options."""


class QualityOptions(Section):
    """From where on an image is blank, dark or blurred."""

    blank_below: Level = Field(
        default=2.0, description="blank: every channel's standard deviation is below this"
    )
    dark_below: Level = Field(
        default=48.0, description="dark: 99 of 100 pixels have a luma below this"
    )
    blurred_below: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=0.03, description="blurred: the relative sharpness is below this"
    )


class ClipOptions(Section):
    """Which text an image is compared with."""

    text: str = Field(default="prompt", description="the column of the texts")


class ZeroShotOptions(Section):
    """The classes of zero-shot classification, and the texts for them."""

    label: str = Field(default="label", description="the column of the labels")
    classes: Classes = Field(
        default=None,
        description="names of the classes, by number or by label; null: those that the input "
        "declares, else the labels themselves",
    )
    template: str | tuple[str, ...] = Field(
        default="a photo of a {label}", description="text for a class, or several texts"
    )

    @field_validator("template")
    @classmethod
    def _names_the_label(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if not texts or not all("{label}" in text for text in texts):
            raise ValueError("text with {label} in it, or a list of such texts")
        return value

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.template,) if isinstance(self.template, str) else self.template


class ClassifierOptions(Section):
    """How labels belong to the classes of a classifier."""

    label: str = Field(default="label", description="the column of the labels")
    classes: dict[str, str | int] | None = Field(
        default=None,
        description="label -> name or number of its class in the model; null: by name, and numbers "
        "without names by number",
    )


class DetectorOptions(Section):
    """From where on an object counts as found, and what becomes of one that is not."""

    threshold: Share = Field(default=0.5, description="a detection has at least this score")
    min_iou: Share = Field(default=0.5, description="an object is found from this overlap on")
    mark_crowd: bool = Field(
        default=False, description="objects that are not found become iscrowd in the output"
    )
    classes: dict[str, str | int] | None = Field(
        default=None, description="category -> name or number of its class in the model"
    )


class RealOptions(Section):
    """The real images that generated ones are compared with."""

    reference: str = Field(description="Parquet with the real images in its column image")
    neighbours: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=3, description="the distance is that to this nearest real image"
    )
    limit: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        default=10_000, description="at most so many real images, evenly over the file"
    )

    @field_validator("limit")
    @classmethod
    def _has_neighbours(cls, value: int, told: ValidationInfo) -> int:
        neighbours = told.data.get("neighbours", 0)
        if value <= neighbours:
            raise ValueError(f"a number above neighbours ({neighbours})")
        return value


class NsfwOptions(Section):
    """The classes of a classifier that are not safe for work."""

    unsafe: tuple[str, ...] = Field(
        default=(), description="names of classes; empty: those known to be unsafe, such as nsfw"
    )
    above: Share = Field(default=0.8, description="from this probability on an image is unsafe")


# Scorer -> its options. The scorers of MODELS need a model, those of MAY_HAVE_MODELS may have one.
OPTIONS: dict[str, type[Section]] = {
    "phash": NoOptions,
    "quality": QualityOptions,
    "clip": ClipOptions,
    "zero-shot": ZeroShotOptions,
    "classifier": ClassifierOptions,
    "detector": DetectorOptions,
    "embedding": NoOptions,
    "source": NoOptions,
    "real": RealOptions,
    "nsfw": NsfwOptions,
}
MODELS = ("clip", "zero-shot", "classifier", "detector", "embedding", "source", "real")
MAY_HAVE_MODELS = (*MODELS, "nsfw")
# The shipped CLIP, which knows only the digits and shapes of the shipped generator.
SHIPPED_CLIP = "digits-shapes-clip"
USES_CLIP = ("clip", "zero-shot", "embedding", "source")


class Settled(Section):
    """What planning found out about a scorer; resume refuses a scorer of which it differs.

    Attributes:
        fingerprint: of its model's files and its settings.
        columns: column -> its type as text, see ``stages.scorers.scorer.kind_text``.
        about: column -> its meaning.
        revision: commit of its model, if that is a hub id.
        reads: the columns of the output that it reads.
        compares: whether it reads the conditioning images.
        classes: label or category, as text -> its class, for scorers that compare classes.
    """

    fingerprint: str
    columns: dict[str, str]
    about: dict[str, str] = Field(default={})
    revision: str | None = None
    reads: tuple[str, ...] = ()
    compares: bool = False
    classes: dict[str, str | int] = Field(default={})


class ScorerSpec(Section):
    """One scorer. ``settled`` is filled in while planning."""

    scorer: str = Field(description="name of a scorer, or module:function of your own")
    model: str | None = Field(
        default=None,
        description="folder, hub id or URL of its model; null: none, or for "
        f"{', '.join(USES_CLIP)} the shipped {SHIPPED_CLIP}",
    )
    revision: str | None = Field(default=None, description="revision, if the model is a hub id")
    batch_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=8, description="images in a call of its model on a GPU; smaller calls are padded"
    )
    options: dict[str, Any] = Field(default={}, description="options of this scorer")
    settled: Settled | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: object) -> object:
        given: Any = _from_text(value) if isinstance(value, str) else value
        is_clip = isinstance(given, dict) and given.get("scorer") in USES_CLIP
        if is_clip and given.get("model") is None and given.get("revision") is None:
            return {**given, "model": SHIPPED_CLIP}
        return given

    @model_validator(mode="after")
    def _known(self) -> ScorerSpec:
        name = self.scorer
        if self.model is not None and not self.model.strip():
            raise Faults([SpecError("score.model", self.model, "a folder, hub id or URL, or null")])
        if self.is_own or (self.settled is not None and name not in OPTIONS):
            return self
        if name not in OPTIONS:
            if any(one.name == name for one in entry_points(group=ENTRY_POINTS)):
                return self
            known = f"{', '.join(OPTIONS)}, or module:function{nearest(name, OPTIONS)}"
            raise Faults([SpecError("score.scorer", name, known)])
        if name in MODELS and self.model is None:
            needed = f"the folder, hub id or URL of a model for {name}, as in {name}=MODEL"
            raise Faults([SpecError("score.model", None, needed)])
        if name not in MAY_HAVE_MODELS and (self.model is not None or self.revision is not None):
            because = f"{name} reads no model; remove it"
            raise Faults([SpecError("score.model", self.model, "null", because=because)])
        if name == "nsfw" and self.model is None:
            self._refuse_idle()
        self.read_options()
        return self

    def _refuse_idle(self) -> None:
        """Refuse what the nsfw scorer without a model would ignore.

        Raises:
            Faults: a revision, or classes that are unsafe.
        """
        if self.revision is not None:
            because = "nsfw reads no model; remove it, or name the model of the revision"
            raise Faults([SpecError("score.revision", self.revision, "null", because=because)])
        unsafe = self.options.get("unsafe")
        if unsafe:
            because = "nsfw without a model has no classes; remove it, or name a model (nsfw=MODEL)"
            raise Faults([SpecError("score.options.unsafe", unsafe, "null", because=because)])

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own scorer, named by ``module:function``."""
        return OWN.fullmatch(self.scorer) is not None

    @property
    def title(self) -> str:
        """The scorer with its model, for messages."""
        return self.scorer if self.model is None else f"{self.scorer}={self.model}"

    def asks_for(self, other: ScorerSpec) -> bool:
        """Whether this is the other scorer, as a user gives it: with the same model and options."""
        fields = ("scorer", "model", "revision", "batch_size")
        same = all(getattr(self, field) == getattr(other, field) for field in fields)
        if not same or self.scorer not in OPTIONS:
            return same and self.options == other.options
        return bool(self.read_options() == other.read_options())

    def read_options(self) -> Any:
        """The options of the scorer, checked, with its defaults.

        Raises:
            Faults: an option that it does not have, or a value that it does not allow.
        """
        kind = OPTIONS[self.scorer]
        try:
            return kind.model_validate(self.options)
        except ValidationError as error:
            raise Faults(
                [
                    SpecError(f"score.options.{fault.field}", fault.given, fault.allowed)
                    for fault in faults_of(error, kind.model_json_schema())
                ]
            ) from None


def _from_text(text: str) -> dict[str, str]:
    """``classifier=PATH`` as a mapping."""
    name, mark, model = text.partition("=")
    return {"scorer": name.strip(), **({"model": model.strip()} if mark else {})}


def read_scorer(text: str) -> ScorerSpec:
    """Read a scorer from the command line: its name, NAME=MODEL, or a mapping in YAML.

    Raises:
        SpecError: it is none of these, or has wrong options.
    """
    tree: object = parse_yaml(text, "--scorer") if text.lstrip().startswith("{") else text
    if not isinstance(tree, str | dict):
        raise SpecError("--scorer", text, FORM)
    try:
        return ScorerSpec.model_validate(tree)
    except ValidationError as error:
        found = list(faults_of(error, ScorerSpec.model_json_schema()))
        raise found[0].beside(found[1:], f"(--scorer {text})") from None
