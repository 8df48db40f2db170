"""The section ``quota`` of the spec, and ``policy.remake``: rounds of further samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator

from batchgen.plain_text import short
from batchgen.spec.model import Section

Rows = Annotated[int, Field(ge=1, le=10**9)]
FACTOR = re.compile(r"(\d+(?:\.\d+)?)x")

MOST = 10**9  # samples, candidates, or times the wanted samples
_WANTED = f"a whole number from 1 to {MOST:,}"
_BUDGET = f"a number of candidates of 1 or more, or a multiple such as 4x, each up to {MOST:,}"


def _is_wanted(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


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

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: object) -> object:
        number = FACTOR.fullmatch(value) if isinstance(value, str) else None
        most = float(number.group(1)) if number else value
        if isinstance(most, bool) or not isinstance(most, int | float) or not 0 < most <= MOST:
            raise ValueError(_BUDGET)
        return value

    @field_validator("accepted", mode="before")
    @classmethod
    def _accepted(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            if not _is_wanted(value):
                raise ValueError(f"{_WANTED}, or groups with such numbers")
            return value
        if not value:
            raise ValueError("a number, or at least one group with its number")
        for name, wanted in value.items():
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise ValueError(f"names of groups as text, so write {name} in quotation marks")
            if not _is_wanted(wanted):
                raise ValueError(f"for each group {_WANTED}; group {name} has {short(str(wanted))}")
        return {str(name): wanted for name, wanted in value.items()}

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
