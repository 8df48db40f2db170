"""Chooses the scorers of a job."""

from __future__ import annotations

from functools import cache

from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import ScoreColumn, Scorer


@cache
def scorers() -> tuple[Scorer, ...]:
    """The scorers that run on every image of every job."""
    return (PixelStatistics(),)


def score_columns() -> tuple[ScoreColumn, ...]:
    """The columns of all scorers, in the order of the output."""
    return tuple(column for scorer in scorers() for column in scorer.columns)
