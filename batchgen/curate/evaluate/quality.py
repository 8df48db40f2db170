"""The figures of a synthetic set next to a real one: distances, fidelity, variety, duplicates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchgen.curate.evaluate.distribution import (
    NEIGHBOURS,
    frechet_distance,
    kernel_distance,
    near_duplicates,
    neighbourhoods,
    vendi_score,
)
from batchgen.curate.evaluate.intervals import Interval, mean_interval, within
from batchgen.curate.evaluate.sets import ImageSet

Array = np.ndarray[Any, Any]

FEWEST = 50  # images of each set for figures of a class
FEWEST_FRECHET = 2
MOST_VENDI = 2000  # images whose Vendi score is computed
NEAR_BITS = 4  # of 64: two images with perceptual hashes this close count as near-duplicates
MOST_HASHES = 100_000


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of the figure.
        value: of the synthetic set.
        interval: 95 %, over images; None where that would be biased.
        deviation: over subsets, for KID.
        reference: the same figure of as many real images: of some next to others of the set, or of
            real images on their own; None if there is none.
        better: ``low``, ``high`` or empty.
        images: (synthetic, real) that it was computed from.
    """

    name: str
    value: float
    interval: Interval | None = None
    deviation: float | None = None
    reference: float | None = None
    better: str = ""
    images: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Quality:
    """All figures of a set, and of its classes that are large enough.

    Attributes:
        extractor: name of the network of features.
        extractor_fingerprint: SHA-256 of its weights and settings.
        overall: figures of all images.
        classes: class -> figures.
        notes: what was left out, and why.
    """

    extractor: str
    extractor_fingerprint: str
    overall: tuple[Figure, ...]
    classes: dict[str, tuple[Figure, ...]]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """Two sets with their features (n, d), and the name and fingerprint of the extractor."""

    real: ImageSet
    synthetic: ImageSet
    real_features: Array
    synthetic_features: Array
    extractor: str
    fingerprint: str
    seed: int


def quality(given: Measured) -> Quality:
    """Compute all figures."""
    notes = []
    overall = [*_figures(given, given.real_features, given.synthetic_features)]
    if len(overall) < 2:
        notes.append(
            f"no figures by neighbours: they need {2 * (NEIGHBOURS + 1)} real and {NEIGHBOURS + 1} "
            f"synthetic images; there are {len(given.real):,} and {len(given.synthetic):,}"
        )
    overall += _own_figures(given)
    classes, small = {}, []
    real_labels, labels = np.array(given.real.labels), np.array(given.synthetic.labels)
    for name in sorted(set(given.real.labels)):
        real, synthetic = np.flatnonzero(real_labels == name), np.flatnonzero(labels == name)
        if min(len(real), len(synthetic)) < FEWEST:
            small.append(name)
            continue
        parts = given.real_features[real], given.synthetic_features[synthetic]
        classes[name] = tuple(_figures(given, *parts))
    if small:
        notes.append(
            f"no figures of {len(small)} of {len(small) + len(classes)} classes: they have fewer "
            f"than {FEWEST} real or synthetic images"
        )
    return Quality(given.extractor, given.fingerprint, tuple(overall), classes, tuple(notes))


def _figures(given: Measured, real: Array, synthetic: Array) -> list[Figure]:
    """Figures from features."""
    name = f"Fréchet distance, extractor {given.extractor}"
    images = min(len(real) // 2, len(synthetic))
    if images < FEWEST_FRECHET:
        sizes = len(synthetic), len(real)
        return [Figure(name, frechet_distance(real, synthetic), None, None, None, "low", sizes)]
    # All distances are of equally many images: they depend on these numbers.
    one, two = _two_of(real, images, given.seed)
    made, both = _some(synthetic, images, given.seed), (images, images)
    reference = frechet_distance(one, two)
    found = [Figure(name, frechet_distance(one, made), None, None, reference, "low", both)]
    if images <= NEIGHBOURS:
        return found
    mean, deviation = kernel_distance(one, made, given.seed)
    reference = kernel_distance(one, two, given.seed)[0]
    found.append(Figure("KID", mean, None, deviation, reference, "low", both))
    near = neighbourhoods(one, made)
    own = neighbourhoods(one, two)
    for part in ("precision", "recall", "density", "coverage"):
        values = getattr(near, part)
        interval = mean_interval(values, given.seed)
        interval = interval if part == "density" else within(interval)
        reference = float(getattr(own, part).mean())
        found.append(Figure(part, float(values.mean()), interval, None, reference, "high", both))
    size = min(len(real), len(synthetic), MOST_VENDI)
    score, of_real = (vendi_score(_some(rows, size, given.seed)) for rows in (synthetic, real))
    found.append(Figure("Vendi score", score, None, None, of_real, "high", (size, size)))
    return found


def _two_of(rows: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Two random parts of a set: what they differ by is the floor of the distances."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows[np.sort(order[:count])], rows[np.sort(order[count : 2 * count])]


def _some(rows: Array, count: int, seed: int) -> Array:
    """Random rows, in their order."""
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    some: Array = rows[np.sort(chosen)]
    return some


def _own_figures(given: Measured) -> list[Figure]:
    """Figures that need no features: CLIP score and near-duplicates."""
    found = []
    clip = given.synthetic.clip
    if len(clip) and not np.isnan(clip).all():
        known = clip[~np.isnan(clip)]
        found.append(
            Figure(
                "CLIP score (column clip_similarity)",
                float(known.mean()),
                mean_interval(known, given.seed),
                better="high",
                images=(len(known), 0),
            )
        )
    images = min(len(given.synthetic), len(given.real), MOST_HASHES)
    rates = [  # of equally many images: among more there are more near-duplicates
        float(near_duplicates(_some(one.hashes, images, given.seed), NEAR_BITS).mean())
        for one in (given.synthetic, given.real)
    ]
    name = f"near-duplicate rate (perceptual hash, {NEAR_BITS} of 64 bits)"
    found.append(Figure(name, rates[0], None, None, rates[1], "low", (images, images)))
    return found
