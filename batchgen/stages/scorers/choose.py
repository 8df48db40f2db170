"""The scorers of a job."""

from __future__ import annotations

from functools import cache

from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import ScoreColumn, Scorer


@cache
def scorers() -> tuple[Scorer, ...]:
    """Those that score every image of every job."""
    return (PixelStatistics(),)


def score_columns() -> tuple[ScoreColumn, ...]:
    """The columns that they fill, in the order of the output."""
    return tuple(column for scorer in scorers() for column in scorer.columns)
