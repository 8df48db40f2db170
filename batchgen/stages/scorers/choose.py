"""The scorers by name, and those of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import ScoreColumn, Scorer

SCORERS: dict[str, Callable[[], Scorer]] = {"pixel-statistics": PixelStatistics}


@cache
def scorer_named(name: str) -> Scorer:
    """One scorer serves all threads of a process."""
    return SCORERS[name]()


def score_columns(names: Sequence[str]) -> tuple[ScoreColumn, ...]:
    """The columns that these scorers fill, in the order of the output."""
    return tuple(column for name in names for column in scorer_named(name).columns)
