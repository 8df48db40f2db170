"""The distance to real images: in units of their own, which copies and threads do not change."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from batchgen.stages.scorers.features import RealDistance, usual_distance
from batchgen.stages.scorers.scorer import Scored

Array = np.ndarray[Any, Any]


def features(count: int, seed: int = 0, size: int = 16) -> Array:
    found: Array = np.random.default_rng(seed).normal(size=(count, size))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def scorer(real: Array, neighbours: int) -> RealDistance:
    def same(images: Any) -> list[Array]:
        return list(images)

    return RealDistance(same, lambda: real, neighbours, "f")


@pytest.mark.parametrize(("count", "neighbours"), [(4, 3), (300, 1), (700, 20)])
def test_the_usual_distance_is_the_median_to_the_own_neighbours(
    count: int, neighbours: int
) -> None:
    real = features(count)
    own = [np.sort(np.sqrt(((real - one) ** 2).sum(axis=1)))[neighbours] for one in real]
    assert usual_distance(real, neighbours) == np.median(own)


def test_copies_in_the_real_set_make_no_distance_of_zero() -> None:
    apart = features(5)
    real = np.concatenate([np.repeat(features(3, seed=1), 4, axis=0), apart])
    found = scorer(real, 3)(Scored([apart[0], features(1, seed=2)[0]]))["real_distance"]
    assert np.isfinite(found).all()
    own = [np.sort(np.linalg.norm(real - one, axis=1))[3] for one in apart]
    assert usual_distance(real, 3) == pytest.approx(float(np.median(own)))

    alike = np.repeat(features(1), 6, axis=0)
    same, other = scorer(alike, 3)(Scored([alike[0], -alike[0]]))["real_distance"]
    assert (same, other) == (0, 2)  # distances themselves


def test_threads_that_ask_at_once_compute_the_real_features_once() -> None:
    calls = []

    def real() -> Array:
        calls.append(1)
        time.sleep(0.1)
        return features(9)

    judge = RealDistance(lambda images: [*map(np.asarray, images)], real, 3, "f")
    pool = [threading.Thread(target=judge, args=(Scored([features(1)[0]]),)) for _ in range(4)]
    for one in pool:
        one.start()
    for one in pool:
        one.join()
    assert len(calls) == 1
