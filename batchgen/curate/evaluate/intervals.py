"""Intervals and tests: Student, the bootstrap, paired signs, Holm, interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Interval = tuple[float, float]

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 4_000_000  # values that are drawn at once
_EXACT = 16  # up to so many pairs every choice of signs is tried: 65,536
MANY = 30  # values from which the bootstrap covers what it should
# The quantile 0.975 of Student's t with 1 to 28 degrees of freedom.
STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646),
    *(2.306, 2.2622, 2.2281, 2.201, 2.1788, 2.1604, 2.1448),
    *(2.1314, 2.1199, 2.1098, 2.1009, 2.093, 2.086, 2.0796),
    *(2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484),
)


def mean_interval(values: Array, seed: int, resamples: int = RESAMPLES) -> Interval:
    """95 % interval of the mean of (n,) values.

    With ``MANY`` values or more by resampling them with replacement. Of fewer, resampling covers
    the mean too seldom (of 5 values: 84 %), so Student's t is used.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < 2:
        return math.nan, math.nan
    if count < MANY:
        mean = float(values.mean())
        reach = STUDENT[count - 2] * float(values.std(ddof=1)) / math.sqrt(count)
        return mean - reach, mean + reach
    rng = np.random.default_rng(seed)
    if np.isin(values, (0.0, 1.0)).all():  # the number of ones in a resample is binomial
        means = rng.binomial(count, values.mean(), resamples) / count
    else:
        step = max(1, _AT_ONCE // count)
        means = np.concatenate(
            [
                values[rng.integers(0, count, (min(step, resamples - done), count))].mean(axis=1)
                for done in range(0, resamples, step)
            ]
        )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def within(interval: Interval, low: float = 0.0, high: float = 1.0) -> Interval:
    """The part of an interval that is possible: a share is from 0 to 1."""
    return interval if math.isnan(interval[0]) else (max(low, interval[0]), min(high, interval[1]))


def sign_flip_test(differences: Array, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of paired differences whose signs would be random without an effect.

    Exact for few pairs, otherwise by random signs.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    if count < 2 or not values.any():
        return 1.0
    if count <= _EXACT:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1  # (2^n, n)
        signs = 1 - 2 * bits
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), (resamples, count))
    extreme = np.abs((signs * values).mean(axis=1)) >= abs(values.mean()) - 1e-12
    return float((extreme.sum() + (count > _EXACT)) / (len(signs) + (count > _EXACT)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda one: p_values[one])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for place, one in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[one]))
        adjusted[one] = highest
    return adjusted


def equivalent_count(
    counts: Sequence[int], accuracies: Sequence[float], reached: float
) -> tuple[float, str]:
    """The number of real images per class with which real images only reach an accuracy.

    Linear in the logarithm of the number, on the learning curve made monotone.

    Returns:
        The number, and ``""``, ``"at most"`` or ``"more than"`` where the curve ends.
    """
    points = sorted(zip(counts, accuracies, strict=True))
    xs = [math.log(count) for count, _ in points]
    ys = np.maximum.accumulate([accuracy for _, accuracy in points])
    if reached <= ys[0]:
        return float(points[0][0]), "at most"
    if reached > ys[-1]:
        return float(points[-1][0]), "more than"
    above = int(np.searchsorted(ys, reached))
    share = (reached - ys[above - 1]) / (ys[above] - ys[above - 1])
    return float(math.exp(xs[above - 1] + share * (xs[above] - xs[above - 1]))), ""
