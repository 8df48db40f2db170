"""Scorers by features: the features themselves, similarity to the source, distance to real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores

Features = Callable[[Sequence[object]], list[Array]]  # images -> features (d,) of length 1
_CHUNK = 256
_SAME = 1e-6  # features that are no further apart are of one image
_SPARE = 8  # neighbours that rounding may take for nearer ones


@dataclass(frozen=True)
class Embedding:
    """The features of each image, of length 1, for searches of copies and of neighbours."""

    features: Features
    size: int
    fingerprint: str
    reads: tuple[str, ...] = ()
    compares: bool = False

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        kind = pa.list_(pa.float16(), self.size)
        return (ScoreColumn("embedding", kind, "features of the image, of length 1"),)

    def __call__(self, images: Scored) -> Scores:
        return {"embedding": [one.astype(np.float16) for one in self.features(images.pixels)]}


@dataclass(frozen=True)
class SourceSimilarity:
    """Cosine of the angle between the features of an image and of its conditioning image."""

    features: Features
    fingerprint: str
    reads: tuple[str, ...] = ()
    compares: bool = True
    columns: tuple[ScoreColumn, ...] = (
        ScoreColumn(
            "source_similarity", pa.float32(), "similarity to the conditioning image, -1 to 1"
        ),
    )

    def __call__(self, images: Scored) -> Scores:
        present = [one for one in images.sources if one is not None]
        found = iter(self.features(present))
        return {
            "source_similarity": [
                None if source is None else _similarity(one, next(found))
                for one, source in zip(self.features(images.pixels), images.sources, strict=True)
            ]
        }


@dataclass(frozen=True)
class RealDistance:
    """Distance to the k-th nearest real image, in units of the real images' own.

    Attributes:
        features: of generated images.
        real: features of the real images (n, d), computed when they are first needed.
        neighbours: k.
    """

    features: Features
    real: Callable[[], Array]
    neighbours: int
    fingerprint: str
    reads: tuple[str, ...] = ()
    compares: bool = False
    columns: tuple[ScoreColumn, ...] = (
        ScoreColumn(
            "real_distance",
            pa.float32(),
            "distance to the nearest real images; 1: as they are from each other",
        ),
    )
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def _found(self) -> tuple[Array, float]:
        real = self.real().astype(np.float64)
        return real, usual_distance(real, self.neighbours)

    @property
    def _reference(self) -> tuple[Array, float]:
        """The real features and the usual distance between them; one thread computes them."""
        with self.turn:
            return self._found

    def __call__(self, images: Scored) -> Scores:
        real, radius = self._reference
        place = self.neighbours - 1
        return {
            "real_distance": [
                float(np.float32(np.partition(_distances(real, one), place)[place] / radius))
                for one in self.features(images.pixels)
            ]
        }


def usual_distance(real: Array, neighbours: int) -> float:
    """The median distance of real features (n, d) to their own k-th neighbours.

    Images that have k copies in the set are left out; 1 if all have.
    """
    lengths = (real**2).sum(axis=1)
    most = min(len(real), neighbours + 1 + _SPARE)
    own = []
    for start in range(0, len(real), _CHUNK):
        part = real[start : start + _CHUNK]
        squares = lengths - 2 * (part @ real.T)  # less the part's own lengths
        near = np.argpartition(squares, most - 1, axis=1)[:, :most]
        for one, places in zip(part, near, strict=True):
            exact = np.sqrt(((real[places] - one) ** 2).sum(axis=1))
            own.append(np.partition(exact, neighbours)[neighbours])  # the nearest one is itself
    apart = [one for one in own if one > _SAME]
    return float(np.median(apart)) if apart else 1.0


def _distances(real: Array, one: Array) -> Array:
    """Euclidean distances (n,) of one feature to all others."""
    parts = [
        ((real[start : start + _CHUNK] - one) ** 2).sum(axis=1)
        for start in range(0, len(real), _CHUNK)
    ]
    found: Array = np.sqrt(np.concatenate(parts))
    return found


def _similarity(one: Array, other: Array) -> float:
    return float(np.float32((one.astype(np.float64) * other.astype(np.float64)).sum()))
