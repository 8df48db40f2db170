"""The figures of two sets of features, against references and against what must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from batchgen.curate.evaluate import distribution
from batchgen.curate.evaluate.distribution import (
    frechet_distance,
    kernel_distance,
    near_duplicates,
    neighbourhoods,
    radii,
    vendi_score,
)
from batchgen.curate.evaluate.intervals import (
    equivalent_count,
    holm,
    mean_interval,
    sign_flip_test,
)
from batchgen.curate.evaluate.quality import Measured, quality
from batchgen.curate.evaluate.sets import ImageSet, Origin


def gaussian(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, width)) + shift).astype(np.float32)


@pytest.mark.parametrize(("count", "other", "width"), [(300, 200, 16), (20, 30, 64), (20, 500, 64)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(
    count: int, other: int, width: int
) -> None:
    one, two = gaussian(count, width, 0), 1.5 * gaussian(other, width, 1, 0.3)
    means = one.mean(0, dtype=np.float64), two.mean(0, dtype=np.float64)
    covariances = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * root
    )
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-3)


def test_shifted_gaussians_have_the_distance_of_their_means() -> None:
    one = gaussian(20_000, 4, 0)
    assert frechet_distance(one, one + 2.0) == pytest.approx(4 * 2.0**2, rel=1e-4)
    assert frechet_distance(one, 3 * one) == pytest.approx(4 * (3 - 1) ** 2, rel=0.03)


def test_a_set_has_no_distance_from_itself_and_order_changes_nothing() -> None:
    one, two = gaussian(200, 8, 0), gaussian(150, 8, 1, 0.5)
    order = np.random.default_rng(2).permutation(len(one))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(one[order], two) == pytest.approx(frechet_distance(one, two), rel=1e-6)
    near, moved = neighbourhoods(one, two), neighbourhoods(one[order], two)
    assert near.coverage[order].tolist() == moved.coverage.tolist()
    assert near.density.tolist() == moved.density.tolist()
    same = neighbourhoods(one, one)
    assert same.precision.all() and same.recall.all() and same.coverage.all()
    assert vendi_score(one) == pytest.approx(vendi_score(one[order]))


def test_kid_is_near_zero_for_one_distribution_and_repeats_by_seed() -> None:
    one, two, far = gaussian(600, 16, 0), gaussian(600, 16, 1), gaussian(600, 16, 2, 0.5)
    mean, deviation = kernel_distance(one, two, seed=0)
    assert abs(mean) < 3 * deviation
    assert kernel_distance(one, far, seed=0)[0] > 10 * deviation
    assert kernel_distance(one, two, seed=0) == (mean, deviation)


def brute_neighbourhoods(real: np.ndarray, synthetic: np.ndarray, k: int) -> tuple[float, ...]:
    """Precision, recall, density and coverage as Naeem et al. define them, pair by pair."""

    def apart(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.array([[math.dist(x, y) for y in two] for x in one])

    own = np.sort(apart(real, real), axis=1)[:, k]
    others = np.sort(apart(synthetic, synthetic), axis=1)[:, k]
    across = apart(real, synthetic)
    inside = across < own[:, None]
    return (
        float(inside.any(axis=0).mean()),
        float((across < others[None]).any(axis=1).mean()),
        float(inside.sum(axis=0).mean() / k),
        float((across.min(axis=1) < own).mean()),
    )


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbourhoods_are_those_of_all_pairs_in_any_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synthetic = gaussian(40, 3, 0).astype(float), gaussian(55, 3, 1, 0.7).astype(float)
    expected = brute_neighbourhoods(real, synthetic, 5)
    original = distribution.blocks
    monkeypatch.setattr(distribution, "blocks", lambda count: original(count, block))
    near = neighbourhoods(real, synthetic)
    found = (near.precision, near.recall, near.density, near.coverage)
    assert [one.mean() for one in found] == pytest.approx(expected)
    assert radii(real, 5).shape == (40,)


def test_few_images_have_no_neighbourhoods() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        neighbourhoods(gaussian(5, 2, 0), gaussian(50, 2, 1))


@pytest.mark.parametrize("width", [6, 40])
def test_the_vendi_score_counts_different_images(width: int) -> None:
    same = np.tile(gaussian(1, width, 0), (12, 1))
    assert vendi_score(same) == pytest.approx(1)
    different = np.eye(6, width, dtype=np.float32)
    assert vendi_score(different) == pytest.approx(6)
    assert vendi_score(np.repeat(different, 3, axis=0)) == pytest.approx(6)


def test_near_duplicates_are_those_within_the_bits() -> None:
    hashes = np.array([0, 0b1111, 0b11111, 2**63, 0xFFFF00000000], dtype=np.uint64)
    assert near_duplicates(hashes, 0).tolist() == [False] * 5
    assert near_duplicates(hashes, 1).tolist() == [True, True, True, True, False]
    assert near_duplicates(np.repeat(hashes, 2), 0).all()


def test_an_interval_of_a_mean_covers_it_at_its_level() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for number in range(200):
        low, high = mean_interval(rng.normal(size=60), seed=number, resamples=1000)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99
    ones = (np.arange(1000) < 300).astype(float)
    low, high = mean_interval(ones, 0)
    deviation = math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation), abs=3e-3)
    assert all(map(math.isnan, mean_interval(np.array([1.0]), 0)))


@pytest.mark.parametrize("count", [2, 3, 5, 10, 29])
def test_an_interval_of_few_values_covers_the_mean_at_its_level(count: int) -> None:
    """The bootstrap covered 52, 75, 84 and 90 % for 2, 3, 5 and 10 values."""
    rng = np.random.default_rng(count)
    found = [mean_interval(rng.normal(size=count), seed, 500) for seed in range(2000)]
    assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(0.95, abs=0.015)
    values = rng.normal(size=count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert mean_interval(values, 0) == pytest.approx(expected, rel=1e-3)


def set_of(name: str, hashes: np.ndarray) -> ImageSet:
    count = len(hashes)
    crops = np.repeat(hashes[:, None], 11, axis=1)
    none, keys = np.zeros((count, 0)), tuple(map(str, range(count)))
    digests = tuple(bytes(16) for _ in keys)
    origin = Origin(name, lambda: iter(()))
    parts = (crops, none, none, np.arange(count), ("",) * count)
    return ImageSet(name, origin, keys, ("c",) * count, digests, *parts)


@pytest.mark.parametrize(("real", "made"), [(100, 1000), (200, 200), (1000, 30)])
def test_a_perfect_generator_reaches_the_reference_at_all_sizes(real: int, made: int) -> None:
    """All figures are of equally many images, else a larger set looks better than a real one."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 8, (real + made, 1)).view(np.uint64)[:, 0] << np.uint64(8)
    hashes += rng.integers(0, 2**7, real + made).astype(np.uint64) << np.uint64(40)
    sets = set_of("real", hashes[:real]), set_of("synthetic", hashes[real:])
    features = gaussian(real, 64, 0), gaussian(made, 64, 1)
    found = {one.name: one for one in quality(Measured(*sets, *features, "x", "y", 0)).overall}
    assert len(found) == 8
    for name in ("Fréchet distance, extractor x", "precision", "coverage", "density", "recall"):
        one = found[name]
        assert one.images == (min(real // 2, made),) * 2
        assert one.value == pytest.approx(one.reference, rel=0.25, abs=0.15), name
    rate = found["near-duplicate rate (perceptual hash, 4 of 64 bits)"]
    assert rate.images == (min(real, made),) * 2
    assert rate.value == pytest.approx(rate.reference, abs=0.2)


def test_few_images_have_no_figures_by_neighbours_and_the_note_says_how_many_are_needed() -> None:
    sets = set_of("real", np.zeros(11, np.uint64)), set_of("synthetic", np.zeros(20, np.uint64))
    features = gaussian(11, 4, 0), gaussian(20, 4, 1)
    found = quality(Measured(*sets, *features, "x", "y", 0))
    assert len(found.overall) == 2
    assert "12 real and 6 synthetic images; there are 11 and 20" in found.notes[0]


@settings(max_examples=30)
@given(st.lists(st.floats(-1, 1).filter(lambda one: abs(one) > 1e-3), min_size=3, max_size=9))
def test_the_sign_test_is_scipys_permutation_test(values: list[float]) -> None:
    found = stats.permutation_test(
        (np.array(values),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(np.array(values), 0) == pytest.approx(found.pvalue, abs=1e-9)


def test_the_sign_test_with_many_pairs_and_with_none() -> None:
    assert sign_flip_test(np.full(30, 0.1), 0) < 0.001
    assert sign_flip_test(np.tile([0.1, -0.1], 15), 0) > 0.5
    assert sign_flip_test(np.zeros(10), 0) == 1.0


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_correction_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(new >= old for new, old in zip(adjusted, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_equivalent_real_images_are_read_off_the_curve() -> None:
    counts, accuracies = (1, 10, 100), (0.5, 0.7, 0.9)
    assert equivalent_count(counts, accuracies, 0.7) == (pytest.approx(10), "")
    assert equivalent_count(counts, accuracies, 0.8) == (pytest.approx(math.sqrt(1000)), "")
    assert equivalent_count(counts, accuracies, 0.4) == (1.0, "at most")
    assert equivalent_count(counts, accuracies, 0.95) == (100.0, "more than")
