"""Draws: what is drawn has the distribution asked for, and depends on nothing else."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchgen.recipes import draws
from batchgen.recipes.field_section import FieldDraw
from batchgen.recipes.fields import numbers
from tests.recipes import rows_of

COUNT = 20_000
KEYS = [f"row-{number}-v{number % 7}".encode() for number in range(COUNT)]
WORDS = draws.Dice(7, "fields.strength").words(KEYS)
LEAST = 1e-3  # the tests are always of the same keys, so they pass or fail for good


@pytest.mark.parametrize(
    ("drawn", "law"),
    [
        ({"uniform": [1.5, 3.0]}, stats.uniform(1.5, 1.5)),
        ({"log_uniform": [0.01, 10.0]}, stats.loguniform(0.01, 10.0)),
        ({"normal": {"mean": 0.5, "std": 0.15}}, stats.norm(0.5, 0.15)),
        (
            {"normal": {"mean": 0.5, "std": 0.15, "low": 0.3, "high": 0.8}},
            stats.truncnorm(-4 / 3, 2, 0.5, 0.15),
        ),
        (
            {"normal": {"mean": 0.0, "std": 1.0, "low": 2.0}},
            stats.truncnorm(2, math.inf, 0, 1),
        ),
    ],
)
def test_numbers_have_their_distribution(drawn: dict[str, Any], law: Any) -> None:
    values = numbers(FieldDraw.model_validate(drawn), WORDS, None)
    assert stats.kstest(values, law.cdf).pvalue > LEAST
    assert len(np.unique(values)) > COUNT * 0.99


def test_different_fields_seeds_and_variants_are_independent() -> None:
    others = [
        draws.Dice(8, "fields.strength").words(KEYS),
        draws.Dice(7, "fields.guidance_scale").words(KEYS),
        draws.Dice(7, "fields.strength").words([key + b"0" for key in KEYS]),
    ]
    for other in others:
        assert stats.kstest(draws.units(other), "uniform").pvalue > LEAST
        assert stats.pearsonr(draws.units(WORDS), draws.units(other)).pvalue > LEAST


def test_a_choice_has_its_weights() -> None:
    weights = [3.0, 1.0, 0.0, 0.5]
    places = draws.chosen(WORDS, ["a", "b", "c", "d"], weights)
    counts = np.bincount(places, minlength=4)
    expected = np.array(weights) / sum(weights) * COUNT
    assert counts[2] == 0
    assert stats.chisquare(counts[[0, 1, 3]], expected[[0, 1, 3]]).pvalue > LEAST


def test_one_sample_and_many_draw_the_same() -> None:
    options, weights = ["x", "y", "z"], [1.0, 2.0, 0.5]
    many = draws.chosen(WORDS[:500], options, weights)
    one = [draws.ranked(int(word), options, weights)[0] for word in WORDS[:500]]
    assert many.tolist() == one


def test_the_members_of_a_pool_are_drawn_alike() -> None:
    pool = draws.words_of([f"photo-{number}" for number in range(50)])
    counts = np.bincount(draws.nearest_of(WORDS, pool), minlength=50)
    assert stats.chisquare(counts).pvalue > LEAST


def test_a_member_that_is_left_out_is_never_drawn_and_the_others_alike() -> None:
    pool = draws.words_of([f"photo-{number}" for number in range(5)])
    without = np.arange(COUNT) % 6 - 1
    drawn = draws.nearest_of(WORDS, pool, without)
    assert (drawn != without).all()
    assert (drawn == draws.nearest_of(WORDS, pool))[without == -1].all()
    counts = np.bincount(drawn[without == 2], minlength=5)
    assert stats.chisquare(counts[[0, 1, 3, 4]]).pvalue > LEAST


def test_pairs_of_a_group_are_drawn_alike() -> None:
    texts = ["rain", "fog", "snow", "sun"]
    pairs = Counter(tuple(draws.ranked(int(word), texts, [1.0] * 4)[:2]) for word in WORDS)
    assert len(pairs) == 12
    assert stats.chisquare(list(pairs.values())).pvalue > LEAST


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_lines_are_drawn_alike(count: int) -> None:
    counts = Counter(draws.numbered(int(word), count) for word in WORDS)
    assert set(counts) <= set(range(count))
    if 1 < count <= 10:
        assert stats.chisquare([counts[number] for number in range(count)]).pvalue > LEAST


@given(st.integers(0, 2**64 - 1), st.integers(1, 2000), st.integers(1, 50))
def test_a_longer_file_moves_samples_to_its_new_lines_only(
    word: int, count: int, more: int
) -> None:
    before, after = draws.numbered(word, count), draws.numbered(word, count + more)
    assert after == before or after >= count


@given(st.lists(st.text(max_size=8), min_size=2, max_size=9, unique=True), st.data())
def test_an_option_that_is_added_takes_samples_and_moves_no_other(
    options: list[str], data: st.DataObject
) -> None:
    weight = st.floats(0.1, 10)
    weights = data.draw(st.lists(weight, min_size=len(options), max_size=len(options)))
    before = draws.chosen(WORDS[:300], options[:-1], weights[:-1])
    after = draws.chosen(WORDS[:300], options, weights)
    moved = after != before
    assert (after[moved] == len(options) - 1).all()


@given(st.floats(-100, 100), st.floats(0, 50), st.sampled_from([0.05, 0.1, 0.25, 1.0, 8.0]))
def test_a_grid_has_only_its_values(low: float, size: float, step: float) -> None:
    low = round(low, 2)
    values = draws.on_grid(WORDS[:300], low, low + size, step)
    assert ((values >= low - 1e-9) & (values <= low + size + 1e-9)).all()
    steps = (values - low) / step
    assert np.abs(steps - np.round(steps)).max() < 1e-6
    assert len(set(values.tolist())) <= draws.grid_size(low, low + size, step)


def test_steps_give_the_numbers_that_one_writes() -> None:
    drawn = {"strength": {"uniform": [0.3, 0.8], "step": 0.1}}
    values = {row["strength"] for row in rows_of({"variants": 200, "fields": drawn}).values()}
    assert values == {0.3, 0.4, 0.5, 0.6, 0.7, 0.8}


def test_whole_numbers_are_drawn_for_settings_that_are_whole() -> None:
    fields = {
        "num_inference_steps": {"uniform": [10, 13]},
        "width": {"uniform": [256, 512], "step": 64},
        "noise_level": {"normal": {"mean": 20, "std": 5, "low": 0, "high": 100}},
    }
    rows = rows_of({"variants": 300, "fields": fields}).values()
    assert {row["num_inference_steps"] for row in rows} == {10, 11, 12, 13}
    assert {row["width"] for row in rows} == {256, 320, 384, 448, 512}
    assert all(isinstance(row["noise_level"], int) for row in rows)


def test_what_is_drawn_stays_the_same_in_later_versions() -> None:
    """These values are those of the first version: another one would change people's data."""
    assert draws.Dice(7, "fields.strength").word(b"cat-v0") == 1418584138224529182
    assert draws.chosen(WORDS[:12], ["a", "b", "c"], [1, 2, 1]).tolist() == [
        1,
        2,
        1,
        1,
        0,
        2,
        1,
        1,
        1,
        1,
        1,
        2,
    ]
