"""Compares two sets of features: Fréchet distance, KID, precision and recall, Vendi score.

Features are float32 (n, d), one row an image. All functions read them in blocks, so memory does not
grow with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 1024  # rows of features that are compared with others at once
NEIGHBOURS = 5  # k of Naeem et al. 2020
SUBSETS, SUBSET = 100, 1000  # of KID, as in torchmetrics and torch-fidelity


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cut ``count`` rows into blocks."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def moments(features: Array) -> tuple[Array, Array]:
    """Mean (d,) and unbiased covariance (d, d) in float64."""
    count, width = features.shape
    mean = np.zeros(width)
    for part in blocks(count):
        mean += features[part].astype(np.float64).sum(axis=0)
    mean /= count
    scatter = np.zeros((width, width))
    for part in blocks(count):
        centred = features[part] - mean  # (b, d) float64
        scatter += centred.T @ centred
    return mean, scatter / max(1, count - 1)


def frechet_distance(one: Array, two: Array) -> float:
    """Squared Fréchet distance of the Gaussians that have the sets' means and covariances.

    Heusel et al. 2017 call it FID if the features are those of their Inception network. It is
    biased upward for small sets: compare only figures of sets of the same sizes.
    """
    mean_one, covariance_one = moments(one)
    mean_two, covariance_two = moments(two)
    shift = mean_one - mean_two
    both = _trace_of_root(one, two, (mean_one, covariance_one), (mean_two, covariance_two))
    traces = np.trace(covariance_one) + np.trace(covariance_two)
    return max(0.0, float(shift @ shift + traces - 2 * both))


def _trace_of_root(
    one: Array, two: Array, first: tuple[Array, Array], second: tuple[Array, Array]
) -> float:
    """The trace of the root of the product of both covariances."""
    (mean_one, covariance_one), (mean_two, covariance_two) = first, second
    width = one.shape[1]
    if min(len(one), len(two)) < width // 2 and max(len(one), len(two)) <= 4 * width:
        # With A and B the centred sets, it is the sum of the singular values of A B^T. That is
        # exact where covariances have no full rank, and faster for few rows.
        product = (one - mean_one) @ (two - mean_two).T  # (n, m)
        scale = np.sqrt(max(1, len(one) - 1) * max(1, len(two) - 1))
        return float(np.linalg.svd(product, compute_uv=False).sum() / scale)
    values, vectors = np.linalg.eigh(covariance_one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ covariance_two @ root)
    return float(np.sqrt(np.clip(inner, 0, None)).sum())


def kernel_distance(
    one: Array, two: Array, seed: int, subsets: int = SUBSETS, subset: int = SUBSET
) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018): mean and standard deviation over subsets.

    It is the unbiased squared maximum mean discrepancy with the kernel (x.y/d + 1)^3, so that it
    may be below zero. A subset has at most half of the smaller set, or subsets would hardly differ.
    """
    size = min(subset, max(2, min(len(one), len(two)) // 2))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        left = one[np.sort(rng.choice(len(one), size, replace=False))].astype(np.float64)
        right = two[np.sort(rng.choice(len(two), size, replace=False))].astype(np.float64)
        found.append(_discrepancy(left, right))
    return float(np.mean(found)), float(np.std(found))


def _discrepancy(one: Array, two: Array) -> float:
    """Unbiased squared MMD of two sets of n rows."""
    count, width = one.shape
    within_one = (one @ one.T / width + 1) ** 3  # (n, n)
    within_two = (two @ two.T / width + 1) ** 3
    across = (one @ two.T / width + 1) ** 3
    pairs = count * (count - 1)
    inside = within_one.sum() - np.trace(within_one) + within_two.sum() - np.trace(within_two)
    return float(inside / pairs - 2 * across.mean())


@dataclass(frozen=True)
class Neighbourhoods:
    """Fidelity and variety by nearest neighbours, one value an image; their means are the figures.

    Attributes:
        precision: of each synthetic image: it is in the neighbourhood of a real one (Kynkaanniemi
            et al. 2019).
        density: of each synthetic image: the number of such neighbourhoods, over k.
        recall: of each real image: it is in the neighbourhood of a synthetic one.
        coverage: of each real image: its neighbourhood has a synthetic one (Naeem et al. 2020).
    """

    precision: Array
    density: Array
    recall: Array
    coverage: Array


def neighbourhoods(real: Array, synthetic: Array, nearest: int = NEIGHBOURS) -> Neighbourhoods:
    """Precision, recall, density and coverage with ``nearest`` neighbours.

    Raises:
        ValueError: a set has fewer than ``nearest + 1`` images.
    """
    if min(len(real), len(synthetic)) <= nearest:
        raise ValueError(f"each set needs more than {nearest} images")
    real_radius = radii(real, nearest)  # (n,)
    synthetic_radius = radii(synthetic, nearest)  # (m,)
    inside = np.zeros(len(synthetic), dtype=np.int64)
    recall = np.zeros(len(real), dtype=bool)
    coverage = np.zeros(len(real), dtype=bool)
    for part in blocks(len(real)):
        for other in blocks(len(synthetic)):
            apart = distances(real[part], synthetic[other])  # (b, c)
            inside[other] += (apart < real_radius[part, None]).sum(axis=0)
            recall[part] |= (apart < synthetic_radius[None, other]).any(axis=1)
            coverage[part] |= (apart < real_radius[part, None]).any(axis=1)
    return Neighbourhoods(inside > 0, inside / nearest, recall, coverage)


def radii(features: Array, nearest: int) -> Array:
    """The distance from each row to its ``nearest``-th neighbour among the others, (n,)."""
    found = np.empty(len(features))
    for part in blocks(len(features)):
        best = np.full((part.stop - part.start, 0), np.inf)
        for other in blocks(len(features)):
            apart = distances(features[part], features[other])
            if part == other:
                np.fill_diagonal(apart, np.inf)
            best = np.concatenate([best, apart], axis=1)
            if best.shape[1] > nearest:
                best = np.partition(best, nearest - 1, axis=1)[:, :nearest]
        found[part] = best[:, nearest - 1] if nearest < len(features) else best.max(axis=1)
    return found


def distances(one: Array, two: Array) -> Array:
    """Euclidean distances (n, m) in float64."""
    left, right = one.astype(np.float64), two.astype(np.float64)
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * left @ right.T
    return np.asarray(np.sqrt(np.clip(squares, 0, None)))


def vendi_score(features: Array) -> float:
    """The effective number of different images (Friedman and Dieng 2023), with cosine similarity.

    From 1, if all are equal, to their number. It grows with the size of the set: compare only sets
    of the same size.
    """
    count, width = features.shape
    gram = np.zeros((width, width)) if width < count else np.zeros((count, count))
    if width < count:
        for part in blocks(count):
            unit = _unit(features[part])
            gram += unit.T @ unit
    else:
        unit = _unit(np.asarray(features))
        gram = unit @ unit.T
    weights = np.clip(np.linalg.eigvalsh(gram / count), 0, None)
    weights = weights[weights > 1e-12] / weights.sum()
    return float(np.exp(-(weights * np.log(weights)).sum()))


def _unit(features: Array) -> Array:
    """Rows of length 1, float64; a row of zeros stays."""
    rows = features.astype(np.float64)
    lengths: Array = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return np.asarray(rows / np.maximum(lengths, 1e-12))


def near_duplicates(hashes: Array, most_bits: int) -> Array:
    """Whether each perceptual hash (uint64) has another within ``most_bits`` differing bits."""
    found = np.zeros(len(hashes), dtype=bool)
    for part in blocks(len(hashes)):
        for other in blocks(len(hashes)):
            if other.start < part.start:
                continue
            close = np.bitwise_count(hashes[part, None] ^ hashes[None, other]) <= most_bits
            if part == other:
                np.fill_diagonal(close, False)
            found[part] |= close.any(axis=1)
            found[other] |= close.any(axis=0)
    return found
