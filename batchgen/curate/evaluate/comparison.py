"""Compares the arms: means, paired differences with intervals, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from batchgen.curate.evaluate.benefit import Trained
from batchgen.curate.evaluate.intervals import (
    Interval,
    equivalent_count,
    holm,
    mean_interval,
    sign_flip_test,
    within,
)
from batchgen.curate.evaluate.protocol import COMPARED, Protocol

Array = np.ndarray[Any, Any]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """The accuracies of one arm with K real images per class (0: none are drawn).

    ``equivalent`` is the number of real images per class with which real images only reach the
    mean, and ``bound`` is ``at most`` or ``more than`` where that is outside of what was measured.
    """

    classifier: str
    per_class: int
    arm: str
    accuracies: tuple[float, ...]
    mean: float
    interval: Interval
    equivalent: float | None = None
    bound: str = ""


@dataclass(frozen=True)
class Difference:
    """Paired differences of two arms: the same draws, and the same seeds of the classifier."""

    classifier: str
    per_class: int
    arm: str
    against: str
    mean: float
    interval: Interval
    wins: int
    ties: int
    losses: int
    p: float
    p_holm: float
    is_primary: bool = False

    @property
    def helps(self) -> bool:
        return self.interval[0] > 0 and self.p_holm < SIGNIFICANT

    @property
    def hurts(self) -> bool:
        return self.interval[1] < 0 and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Benefit:
    """What was measured, and what it says.

    Attributes:
        cells: each arm with each K.
        differences: those that are compared; Holm's correction is over all of them.
        verdict: one or two sentences.
        helps: whether synthetic images helped by the primary endpoint.
        caveats: what the figures do not say.
    """

    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    verdict: str
    helps: bool
    caveats: tuple[str, ...]

    @property
    def primary(self) -> Difference:
        return next(one for one in self.differences if one.is_primary)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    trained: Sequence[Trained], protocol: Protocol, pool_per_class: float | None
) -> Benefit:
    """Cells, differences and verdict.

    Args:
        pool_per_class: mean number of the pool's images of a class; None without a pool.
    """
    cells = [_cell(trained, protocol, *place) for place in _places(trained)]
    cells = [_with_equivalent(one, cells, pool_per_class) for one in cells]
    differences = _differences(cells, protocol)
    primary = next(one for one in differences if one.is_primary)
    plain = next(
        one
        for one in differences
        if (one.classifier, one.per_class, one.against)
        == (primary.classifier, primary.per_class, "real")
    )
    helps = primary.helps and plain.helps
    return Benefit(
        tuple(cells),
        tuple(differences),
        _verdict(primary, plain, helps),
        helps,
        tuple(_caveats(cells, primary, len(differences))),
    )


def _places(trained: Sequence[Trained]) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys((one.classifier, one.per_class, one.arm) for one in trained))


def _cell(
    trained: Sequence[Trained], protocol: Protocol, classifier: str, count: int, arm: str
) -> Cell:
    mine = [one for one in trained if (one.classifier, one.per_class) == (classifier, count)]
    found = sorted((one.draw, one.accuracy) for one in mine if one.arm == arm)
    values = tuple(accuracy for _, accuracy in found)
    seed = protocol.seed_of("interval", classifier, count, arm)
    return Cell(
        classifier,
        count,
        arm,
        values,
        float(np.mean(values)),
        within(mean_interval(np.array(values), seed)),
    )


def _with_equivalent(cell: Cell, cells: Sequence[Cell], pool: float | None) -> Cell:
    curve = [
        (one.per_class, one.mean)
        for one in cells
        if one.classifier == cell.classifier and one.arm == "real"
    ]
    ceiling = [one.mean for one in cells if one.classifier == cell.classifier and one.arm == "pool"]
    if ceiling and pool is not None and pool > max(count for count, _ in curve):
        curve.append((round(pool), ceiling[0]))
    if cell.arm in ("real", "pool", "real+shuffled") or len(curve) < 2:
        return cell
    counts, means = zip(*sorted(curve), strict=True)
    number, bound = equivalent_count(counts, means, cell.mean)
    return replace(cell, equivalent=round(number, 1), bound=bound)


def _differences(cells: Sequence[Cell], protocol: Protocol) -> list[Difference]:
    by_place = {(one.classifier, one.per_class, one.arm): one for one in cells}
    found = []
    for classifier in protocol.classifiers:
        for count in protocol.per_class:
            for arm, against in COMPARED:
                one = by_place[classifier, count, arm]
                other = by_place[classifier, count, against]
                found.append(_difference(one, other, protocol))
    adjusted = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True)]


def _difference(one: Cell, other: Cell, protocol: Protocol) -> Difference:
    apart = np.array(one.accuracies) - np.array(other.accuracies)
    place = (one.classifier, one.per_class, one.arm, other.arm)
    seed = protocol.seed_of("difference", *place)
    p = sign_flip_test(apart, seed)
    return Difference(
        *place,
        mean=float(apart.mean()),
        interval=mean_interval(apart, seed),
        wins=int((apart > 0).sum()),
        ties=int((apart == 0).sum()),
        losses=int((apart < 0).sum()),
        p=p,
        p_holm=p,
        is_primary=place == protocol.primary,
    )


def shown(one: Difference) -> str:
    """A difference in points with its interval and wins."""
    low, high = (100 * end for end in one.interval)
    draws = one.wins + one.ties + one.losses
    return (
        f"{100 * one.mean:+.1f} points [{low:+.1f}, {high:+.1f}], better in {one.wins} of {draws} "
        f"draws, p = {one.p_holm:.3g} (Holm)"
    )


def _verdict(primary: Difference, plain: Difference, helps: bool) -> str:
    against = (
        f"against real images with geometric augmentation {shown(primary)}; against real images "
        f"only {shown(plain)}"
    )
    if helps:
        return f"The synthetic images help: {against}."
    if primary.hurts or plain.hurts:
        return f"The synthetic images do not help: they cost accuracy; {against}."
    if plain.helps:
        return (
            "No benefit over plain augmentation is shown: synthetic images are better than real "
            f"images only, but not than rotating, shifting and scaling these; {against}."
        )
    return f"No benefit is shown: {against}."


def _caveats(cells: Sequence[Cell], primary: Difference, tests: int) -> list[str]:
    """What the figures do not say, from the figures."""
    of_primary = [
        one
        for one in cells
        if (one.classifier, one.per_class) == (primary.classifier, primary.per_class)
    ]
    means = {one.arm: one.mean for one in of_primary}
    found = []
    if means["real+shuffled"] >= means["real"]:
        found.append(
            "The negative control does not hurt: with shuffled labels the synthetic images are as "
            "good as none. So a gain may come from the images as such, not from their labels."
        )
    for one in of_primary:
        if one.arm == "real" and len(set(one.accuracies)) == 1:
            found.append("All draws gave the same accuracy, so the intervals say nothing.")
    draws = primary.wins + primary.ties + primary.losses
    least = 2 * 0.5**draws * tests
    if least >= SIGNIFICANT:
        found.append(
            f"With {draws} draws no difference can be significant: the least p-value is "
            f"{min(1.0, least):.2g} after Holm's correction of {tests} tests. Use more draws."
        )
    return found
