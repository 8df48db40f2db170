"""A field of a recipe: how the value of a column comes about, drawn, computed or asked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from batchgen.spec.model import Section
from batchgen.spec.sections import MAX_TEXT

Scalar = bool | int | float | Annotated[str, Field(max_length=MAX_TEXT)] | None
Number = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
EnvironmentVariable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Normal(Section):
    """A normal distribution, of which only the part between low and high is drawn."""

    mean: Number
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    low: Number | None = None
    high: Number | None = None

    @model_validator(mode="after")
    def _near(self) -> Normal:
        low, high = self.limits
        if low >= high:
            raise ValueError("low below high")
        if low > self.mean + 6 * self.std or high < self.mean - 6 * self.std:
            raise ValueError("limits within 6 standard deviations of the mean")
        return self

    @property
    def limits(self) -> tuple[float, float]:
        """Low and high; infinite if they are not set."""
        return (
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )


class Provider(Section):
    """A language model: an installed function by name, or a server with OpenAI's API.

    Secrets are never written down: the recipe names environment variables.
    """

    function: str | None = Field(
        default=None, description="name of an entry point of the group batchgen.ask"
    )
    url_env: EnvironmentVariable = Field(
        default="OPENAI_BASE_URL", description="the variable that holds the server's URL"
    )
    key_env: EnvironmentVariable | None = Field(
        default=None, description="the variable that holds the key"
    )
    model: str = Field(default="", description="the model's name, for the server")


class Ask(Section):
    """A question to a language model, asked once for each different text."""

    prompt: Text
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    provider: Provider = Field(default=Provider(), alias="with")
    system: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=10_000)] = 200


TwoNumbers = Annotated[tuple[Number, ...], Field(min_length=2, max_length=2)]
WAYS = (
    *("value", "uniform", "log_uniform", "normal", "choice", "each", "column", "template", "ask"),
)


class FieldDraw(Section):
    """How the value of a column comes about: exactly one of the ways, or a plain value."""

    value: Scalar = None
    uniform: TwoNumbers | None = Field(default=None, description="lowest and highest value")
    log_uniform: TwoNumbers | None = Field(default=None, description="the same, both above 0")
    normal: Normal | None = None
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="draw only low, low + step and so on"
    )
    choice: dict[str, Weight] | tuple[Scalar, ...] | None = Field(
        default=None, description="values to draw from, or a mapping from values to weights"
    )
    each: tuple[Scalar, ...] | None = Field(
        default=None, description="all of these values: the samples are multiplied"
    )
    column: str | None = Field(default=None, description="a column of the source")
    template: Text | None = None
    ask: Ask | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        """A plain value is a constant."""
        return value if isinstance(value, Mapping) else {"value": value}

    @model_validator(mode="after")
    def _one_way(self) -> FieldDraw:
        given = [name for name in WAYS if name in self.model_fields_set]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of {', '.join(WAYS)} ({found} is set)")
        if self.step is not None and self.way not in ("uniform", "log_uniform", "normal"):
            raise ValueError("step only with uniform, log_uniform and normal")
        for low, high in filter(None, (self.uniform, self.log_uniform)):
            if low > high or (self.log_uniform and low <= 0):
                above = " above 0" if self.log_uniform else ""
                raise ValueError(f"two numbers{above}, the lower one first")
        self._options()
        return self

    @property
    def way(self) -> str:
        """The name of the one way that is set."""
        return next(name for name in WAYS if name in self.model_fields_set)

    @property
    def options(self) -> tuple[list[Any], list[float]]:
        """The values of ``choice`` with their weights. Names that all look like numbers are."""
        if isinstance(self.choice, tuple):
            return list(self.choice), [1.0] * len(self.choice)
        given = self.choice or {}
        numbers = list(map(_number, given))
        as_numbers = None not in numbers
        return (numbers if as_numbers else list(given)), list(given.values())

    def known_values(self) -> list[Any]:
        """All values, or the smallest and the largest, as far as the recipe says them."""
        if self.way == "value":
            return [self.value]
        if self.way == "each":
            return list(self.each or ())
        if self.way == "choice":
            return self.options[0]
        if self.normal is not None:
            return [one for one in self.normal.limits if math.isfinite(one)]
        return list(self.uniform or self.log_uniform or ())

    def _options(self) -> None:
        values, weights = self.options if self.way == "choice" else (list(self.each or ()), [1.0])
        if self.way not in ("choice", "each"):
            return
        if not values or not any(weights):
            raise ValueError("one value or more, of which one has a weight above 0")
        if len({repr(one) for one in values}) < len(values):
            raise ValueError("each value once; give it a weight instead")
        kinds = {_kind(one) for one in values if one is not None}
        if len(kinds) > 1:
            raise ValueError("values of one type: numbers, text, or true and false")


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and re.fullmatch(r"\s*-?\d+\s*", text) else number


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else "text"
