"""The section ``quota`` of the spec, and ``policy.remake``: rounds of further samples."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from batchgen.spec.model import Section

Rows = Annotated[int, Field(ge=1, le=10**9)]
FACTOR = re.compile(r"(\d+(?:\.\d+)?)x")


class Follow(Section):
    """Where the next round's candidates go, by the scores of the samples that were accepted."""

    score: str = Field(description="a column of numbers; the highest means the hardest")
    lowest: bool = Field(default=False, description="the lowest score means the hardest")
    cells: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="columns of the rows that make a cell, such as template and strength"
    )
    bins: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="bins of a column of numbers, with equal numbers of rows"
    )
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.2, description="the part of the candidates that all cells share equally"
    )


class Quota(Section):
    """How many accepted samples each group needs."""

    per: tuple[str, ...] = Field(
        default=(), description="columns of the rows that make a group; none: all are one group"
    )
    accepted: Rows | dict[str, Rows] = Field(
        description="accepted samples of each group, or group -> its number"
    )
    where: str = Field(default="", description="a condition that counted samples must meet")
    by: str = Field(default="", description="the column that ranks which samples stay")
    lowest: bool = Field(default=False, description="with by: the lowest first")
    budget: int | str = Field(
        default="4x", description="most candidates in all, or a multiple of the wanted samples"
    )
    rounds: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=10, description="most rounds after the first"
    )
    follow: Follow | None = None

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: int | str) -> int | str:
        number = FACTOR.fullmatch(value) if isinstance(value, str) else None
        most = float(number.group(1)) if number else value
        if isinstance(most, str) or most <= 0 or isinstance(value, bool):
            raise ValueError("a number of candidates of 1 or more, or a multiple such as 4x")
        return value

    @field_validator("accepted")
    @classmethod
    def _accepted(cls, value: int | dict[str, int]) -> int | dict[str, int]:
        if value == {}:
            raise ValueError("a number, or at least one group with its number")
        return value

    def most(self, wanted: int) -> int:
        """The number of candidates that the budget allows, for this number of wanted samples."""
        if isinstance(self.budget, int):
            return self.budget
        return int(float(self.budget.removesuffix("x")) * wanted)


class Remake(Section):
    """Rejected samples that are made again at the end of a run."""

    reasons: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="reasons of rejected samples that another seed may change"
    )
    rounds: Annotated[int, Field(ge=1, le=100)] = Field(
        default=2, description="how often a sample is made again at most"
    )
