"""The recipe: which samples to make of which rows, validated from YAML into frozen sections."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from batchgen.errors import SpecError
from batchgen.recipes.field_section import FieldDraw, Text, Weight
from batchgen.spec.call_settings import CALL_SETTINGS
from batchgen.spec.faults import Faults, faults_of
from batchgen.spec.model import Section
from batchgen.spec.sections import MAX_TEXT, Seed
from batchgen.spec.tree import read_yaml, unreadable, without

MAX_VARIANTS = 1_000_000
MAX_ROWS = 100_000  # of a table that is written into the recipe
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")
RESERVED = ("key", "row_key", "variant", "template")  # columns that every expansion writes


class TemplateText(Section):
    """A template of prompts. The weight is its part of the samples."""

    text: Text
    weight: Weight = 1.0

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: object) -> object:
        return {"text": value} if isinstance(value, str) else value


class PairWith(Section):
    """Which source image a sample gets."""

    partner: Literal["own", "other"] | None = None
    column: str | None = Field(default=None, description="a column with the keys of images")

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return value if isinstance(value, Mapping) else {"partner": value}

    @model_validator(mode="after")
    def _one(self) -> PairWith:
        if (self.partner is None) == (self.column is None):
            raise ValueError("own, other, or a mapping {column: NAME}")
        return self


class Pair(Section):
    """A source image for each sample: of its own class, of another class, or by key."""

    partner: PairWith = Field(alias="with")
    images: str | None = Field(
        default=None, description="Parquet with images, labels and keys; null: that of `from`"
    )
    into: str = Field(default="image", description="the column for the image")
    label: Literal["target", "source", "soft"] = Field(
        default="target",
        description="target: the label of the row; source: that of the image; soft: a list of both",
    )
    gamma: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.5, description="soft labels: the row's label weighs strength ** gamma"
    )


class Balance(Section):
    """How many samples each class gets in total, whatever its number of rows."""

    column: str
    target: Annotated[int, Field(ge=1, le=10**9)] | Literal["max"] = Field(
        description="samples of each class; max: as many as the largest class has rows"
    )
    include_sources: bool = Field(
        default=False, description="the source rows count as well: only what is missing is made"
    )


class Recipe(Section):
    """Which samples to make: source rows, templates, fields, pairs and balance."""

    seed: Seed = 0
    source: str | tuple[str | dict[str, Any], ...] | None = Field(
        default=None,
        alias="from",
        description="a Parquet file, folder or URL; or a list of class names or rows; null: the "
        "classes, or one row",
    )
    key: str | None = Field(default=None, description="column that names a row")
    label: str = Field(default="label", description="column with the class")
    variants: Annotated[int, Field(ge=1, le=MAX_VARIANTS)] | str | None = Field(
        default=None, description="samples of each row; A:B makes only those from A to B - 1"
    )
    classes: str | tuple[Any, ...] | dict[str, Any] | None = Field(
        default=None, description="a table of classes: a Parquet or CSV file, a list or a mapping"
    )
    templates: dict[str, TemplateText] = Field(default={}, description="templates of prompts")
    each_template: bool = Field(
        default=False, description="use each template for each variant; else one is drawn"
    )
    wildcards: str | None = Field(default=None, description="folder with files NAME.txt")
    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] | FieldDraw | None = None
    fields: dict[str, FieldDraw] = Field(default={}, description="name -> how it is drawn")
    pair: tuple[Pair, ...] = ()
    balance: Balance | None = None

    @field_validator("templates", mode="before")
    @classmethod
    def _one_template(cls, value: object) -> object:
        return {"prompt": value} if isinstance(value, str) else value or {}

    @field_validator("pair", mode="before")
    @classmethod
    def _one_pair(cls, value: object) -> object:
        return [value] if isinstance(value, Mapping) else value or ()

    @field_validator("variants")
    @classmethod
    def _range(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            variant_range(value)
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        faults = list(_refusals(self))
        if faults:
            raise Faults(faults)
        return self

    def all_fields(self) -> dict[str, FieldDraw]:
        """The fields in their order; the negative prompt is one."""
        if self.negative_prompt is None:
            return dict(self.fields)
        given = self.negative_prompt
        made = given if isinstance(given, FieldDraw) else FieldDraw(template=given or None)
        if isinstance(given, str) and not given:
            made = FieldDraw(value="")
        return {**self.fields, "negative_prompt": made}


def variant_range(given: int | str | None) -> tuple[int, int]:
    """Return the first variant and one past the last.

    Raises:
        ValueError: it is neither a number nor of the form A:B.
    """
    if given is None:
        return 0, 1
    if isinstance(given, int):
        return 0, given
    found = re.fullmatch(r"(\d{1,7}):(\d{1,7})", given.strip())
    if found is None or not int(found[1]) < int(found[2]) <= MAX_VARIANTS:
        raise ValueError(f"a number up to {MAX_VARIANTS:,}, or A:B with A below B, such as 3:4")
    return int(found[1]), int(found[2])


def read_recipe(path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file; ``changes`` replace fields of the top level.

    Raises:
        InputError: the file is missing or is not YAML.
        SpecError: one line for each wrong field.
    """
    return build_recipe({**read_yaml(path), **(changes or {})})


def build_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Validate a nested dictionary into a recipe.

    Raises:
        SpecError: one line for each wrong field: its name, what was given and what is allowed.
    """
    found = {fault.field: fault for fault in unreadable(tree)}
    kept = dict(tree)
    fresh = list(found.values())
    while True:  # checks between fields run once each field is valid by itself
        for fault in fresh:
            kept = without(kept, ".".join(fault.field.split(".")[:2]))
        try:
            recipe = Recipe.model_validate(kept)
            break
        except ValidationError as error:
            told = faults_of(error, Recipe.model_json_schema())
            fresh = [one for one in told if not _is_told(one.field, found)]
        if not fresh:
            break
        found.update({fault.field: fault for fault in fresh})
    if found:
        first, *others = found.values()
        raise first.beside(others)
    return recipe


def _is_told(field: str, found: Mapping[str, SpecError]) -> bool:
    return any(f"{field}.".startswith(f"{one}.") or one.startswith(f"{field}.") for one in found)


def _refusals(recipe: Recipe) -> Iterator[SpecError]:
    """Find what is wrong with names and between fields."""
    for section in ("templates", "fields"):
        for name in getattr(recipe, section):
            if not NAME.fullmatch(name):
                yield SpecError(f"{section}.{name[:60]}", name, "letters, digits and _ as a name")
    for name in recipe.fields:
        if name in RESERVED or (name == "prompt" and recipe.templates):
            yield SpecError(f"fields.{name}", "a field", "another name", said="is written anyway")
    if recipe.negative_prompt is not None and "negative_prompt" in recipe.fields:
        because = "fields.negative_prompt is set as well; remove one of the two"
        yield SpecError("negative_prompt", "a text", "null", because=because)
    if recipe.balance is not None and recipe.variants is not None:
        because = "balance decides the number of samples; remove one of the two"
        yield SpecError("variants", recipe.variants, "null", because=because)
    if recipe.each_template and not recipe.templates:
        yield SpecError("each_template", True, "false", because="there are no templates")
    if isinstance(recipe.source, tuple) and len(recipe.source) > MAX_ROWS:
        allowed = f"up to {MAX_ROWS:,} rows; write more to a Parquet file"
        yield SpecError("from", "a list", allowed, said=f"has {len(recipe.source):,} rows")
    for name, drawn in recipe.all_fields().items():
        yield from _setting_faults(name, drawn)
    yield from _pair_faults(recipe)


def _setting_faults(name: str, drawn: FieldDraw) -> Iterator[SpecError]:
    """Check the values that a sampling setting can get."""
    setting = CALL_SETTINGS.get(name)
    field = name if name == "negative_prompt" else f"fields.{name}"
    if setting is None or not setting.by_row:
        return
    for value in drawn.known_values():
        if drawn.way == "value" and value is None:
            continue
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        try:
            setting.adapter.validate_python(whole, strict=isinstance(whole, bool | str))
        except ValidationError as error:
            said: str = error.errors()[0]["msg"].removeprefix("Input should be ")
            yield SpecError(f"{field}.{drawn.way}", value, said)
            return


def _pair_faults(recipe: Recipe) -> Iterator[SpecError]:
    names = [pair.into for pair in recipe.pair]
    for number, pair in enumerate(recipe.pair):
        field = f"pair.{number}" if len(recipe.pair) > 1 else "pair"
        if not NAME.fullmatch(pair.into) or pair.into in (*RESERVED, *recipe.fields):
            yield SpecError(f"{field}.into", pair.into, "a name that no other column has")
        if pair.into in names[:number]:
            yield SpecError(f"{field}.into", pair.into, "another column for each pair")
        if pair.images is None and not isinstance(recipe.source, str):
            yield SpecError(f"{field}.images", None, "a Parquet file with images")
        if pair.label == "soft" and "strength" not in recipe.fields:
            because = "soft labels depend on fields.strength, which is not set"
            yield SpecError(f"{field}.label", pair.label, "", because=because)
