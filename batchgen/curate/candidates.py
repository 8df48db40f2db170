"""Chooses the rows of a quota's next round: as many for each group and cell as they need."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchgen.curate.groups import Groups
from batchgen.plan.extend import Samples

Array = np.ndarray[Any, Any]


def needs(deficits: Array, accepted: Array, candidates: Array, left: int) -> Array:
    """The number of candidates of each group in the next round.

    A group needs its deficit divided by its accept rate so far, by Laplace's rule of succession,
    so that a group without an accepted sample has a rate as well. While a rate is uncertain, a
    round stays small: at most twice the candidates so far, or the deficit. If the groups need more
    than the budget has ``left``, each gets its part of it.

    Args:
        deficits, accepted, candidates: of each group; shape (groups,).
        left: of the budget.
    """
    rates = (accepted + 1) / (candidates + 2)
    needed: Array = np.ceil(deficits / rates).astype(np.int64)
    needed = np.minimum(needed, np.maximum(deficits, 2 * candidates))
    return shares(left, needed) if needed.sum() > left else needed


def shares(total: int, weights: Array) -> Array:
    """Divide a number by weights; what is left by rounding goes to the largest remainders."""
    if not weights.sum():
        return np.zeros(len(weights), np.int64)
    exact = total * (weights / weights.sum())
    given: Array = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - given), kind="stable")
    order = order[weights[order] > 0]
    given[order[: total - int(given.sum())]] += 1
    return given


def cell_weights(means: Array, floor: float, lowest: bool) -> Array:
    """The weights of cells: in proportion to their mean score, and at least a part of an equal one.

    Args:
        means: mean score of each cell's accepted samples; NaN for cells without any, which get the
            mean of the others. Shape (cells,).
        floor: the part of the candidates that all cells share equally.
        lowest: the lowest score is the hardest.
    """
    equal = np.full(len(means), 1 / len(means))
    known = means[~np.isnan(means)]
    if not len(known):
        return equal
    scores = np.where(np.isnan(means), known.mean(), means)
    if lowest:
        scores = scores.max() + scores.min() - scores
    scores = scores - min(0.0, scores.min())
    own = scores / scores.sum() if scores.sum() > 0 else equal
    weights: Array = floor * equal + (1 - floor) * own
    return weights


def chosen_rows(
    needed: Array, groups: Groups, cells: Groups, weights: Sequence[Array | None], so_far: Array
) -> list[int]:
    """The row of each candidate; a row occurs as often as it has candidates.

    Args:
        needed: candidates of each group.
        groups, cells: of the rows.
        weights: for each group, the weight of each cell; None: all rows have the same.
        so_far: candidates of each row until now; rows with the fewest come first.
    """
    found: list[int] = []
    for group, count in enumerate(needed.tolist()):
        rows = np.flatnonzero(groups.of_row == group)
        own = weights[group]
        if own is None:
            found += _spread(count, rows, so_far)
            continue
        inside = np.unique(cells.of_row[rows])
        for cell, number in zip(inside, shares(count, own[inside]).tolist(), strict=True):
            found += _spread(number, rows[cells.of_row[rows] == cell], so_far)
    return found


def _spread(count: int, rows: Array, so_far: Array) -> list[int]:
    """Take rows one by one, always one with the fewest candidates, the first of them."""
    queue = list(zip(so_far[rows].tolist(), rows.tolist(), strict=True))
    heapq.heapify(queue)
    found = []
    for _ in range(count if queue else 0):
        number, row = queue[0]
        heapq.heapreplace(queue, (number + 1, row))
        found.append(row)
    return found


def as_samples(rows: list[int], first_variant: int, nothing: int) -> Samples:
    """The candidates with their variants, which are numbered on from ``first_variant``."""
    times: dict[int, int] = {}
    samples: Samples = []
    for row in sorted(rows):
        samples.append((row, first_variant + times.get(row, 0), nothing))
        times[row] = times.get(row, 0) + 1
    return samples
