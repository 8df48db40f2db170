"""Expansions are stable: what is added, left out or reordered changes no other drawn value."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes import Row, rows_of

NAMES = st.lists(
    st.text("abcdefgh-_ é{}%|$", min_size=1, max_size=6), min_size=2, max_size=6, unique=True
)
SEEDS = st.integers(0, 2**63 - 1)
TEMPLATES = {
    "plain": "a photo of {{ name }}",
    "weather": {
        "text": "{small|0.3::large} {{ name }} in {1-2$$ and $$rain|fog|snow}",
        "weight": 2,
    },
    "pick": "{{ ['red', 'blue', 'green'] | pick }} {{ name }}, {{ strength }}",
}
FIELDS: dict[str, Any] = {
    "strength": {"normal": {"mean": 0.5, "std": 0.2, "low": 0.1, "high": 0.9}},
    "guidance_scale": {"uniform": [1.5, 3.0]},
    "lora": {"choice": {"": 3, "ink:0.8": 1}},
    "mood": {"template": "{calm|loud|odd} {{ name }}"},
}
FEW = settings(max_examples=30)  # each example expands several recipes
DRAWN = ("strength", "guidance_scale", "lora", "mood", "template", "prompt")


def recipe(names: list[str], seed: int, **changes: Any) -> dict[str, Any]:
    base = {"seed": seed, "from": names, "variants": 3, "templates": TEMPLATES, "fields": FIELDS}
    return {**base, **changes}


def drawn(row: Row) -> Row:
    return {name: row[name] for name in DRAWN}


def assert_same(before: dict[str, Row], after: dict[str, Row]) -> None:
    """Every sample that is in both is the same."""
    shared = before.keys() & after.keys()
    assert shared
    for key in shared:
        assert drawn(before[key]) == drawn(after[key])


@FEW
@given(NAMES, SEEDS)
def test_a_second_expansion_is_the_same(names: list[str], seed: int) -> None:
    assert rows_of(recipe(names, seed)) == rows_of(recipe(names, seed))


@FEW
@given(NAMES, SEEDS)
def test_added_and_removed_rows_change_no_other(names: list[str], seed: int) -> None:
    all_rows, fewer = rows_of(recipe(names, seed)), rows_of(recipe(names[1:], seed))
    assert fewer.keys() < all_rows.keys()
    assert_same(all_rows, fewer)


@FEW
@given(NAMES, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_rows_is_of_no_effect(
    names: list[str], seed: int, order: random.Random
) -> None:
    mixed = order.sample(names, len(names))
    one, other = rows_of(recipe(names, seed)), rows_of(recipe(mixed, seed))
    assert one.keys() == other.keys()
    assert_same(one, other)


@FEW
@given(NAMES, SEEDS, st.integers(1, 6))
def test_variants_can_be_made_one_by_one(names: list[str], seed: int, count: int) -> None:
    together = rows_of(recipe(names, seed, variants=count))
    apart = [rows_of(recipe(names, seed), (number, number + 1)) for number in range(count)]
    merged = {key: row for rows in apart for key, row in rows.items()}
    assert merged == together


@FEW
@given(NAMES, SEEDS, st.sampled_from(sorted(FIELDS)))
def test_an_added_field_changes_no_other(names: list[str], seed: int, name: str) -> None:
    without = {key: one for key, one in FIELDS.items() if key != name}
    texts = {key: TEMPLATES[key] for key in ("plain", "weather")}
    fewer = rows_of(recipe(names, seed, fields=without, templates=texts))
    more = rows_of(recipe(names, seed, templates=texts))
    assert fewer.keys() == more.keys()
    for key, row in fewer.items():
        assert row.items() <= more[key].items()


@FEW
@given(NAMES, SEEDS)
def test_an_exhaustive_field_multiplies_samples_and_changes_none(
    names: list[str], seed: int
) -> None:
    fields = {**FIELDS, "scheduler": {"each": ["DDIMScheduler", "EulerDiscreteScheduler"]}}
    before, after = rows_of(recipe(names, seed)), rows_of(recipe(names, seed, fields=fields))
    assert len(after) == 2 * len(before)
    by_sample = {(row["row_key"], row["variant"]): drawn(row) for row in before.values()}
    for row in after.values():
        assert drawn(row) == by_sample[row["row_key"], row["variant"]]


@FEW
@given(NAMES, SEEDS, st.floats(0.1, 5))
def test_an_added_template_takes_samples_and_changes_no_other_value(
    names: list[str], seed: int, weight: float
) -> None:
    more = {**TEMPLATES, "new": {"text": "{{ name }}, {up|down}", "weight": weight}}
    before, after = rows_of(recipe(names, seed)), rows_of(recipe(names, seed, templates=more))
    assert before.keys() == after.keys()
    for key, row in before.items():
        now = after[key]
        fields = FIELDS.keys()
        assert {name: row[name] for name in fields} == {name: now[name] for name in fields}
        if now["template"] != "new":
            assert drawn(now) == drawn(row)


@FEW
@given(NAMES, SEEDS)
def test_each_template_for_each_variant(names: list[str], seed: int) -> None:
    every = rows_of(recipe(names, seed, each_template=True))
    assert len(every) == len(names) * 3 * len(TEMPLATES)
    by_template = {
        (row["row_key"], row["variant"], row["template"]): row["prompt"] for row in every.values()
    }
    for row in rows_of(recipe(names, seed)).values():
        place = row["row_key"], row["variant"], row["template"]
        assert by_template[place] == row["prompt"]


@FEW
@given(NAMES, SEEDS)
def test_options_added_to_a_group_move_samples_to_them_only(names: list[str], seed: int) -> None:
    few = rows_of(recipe(names, seed, templates="{a|b} {{ name }}"))
    more = rows_of(recipe(names, seed, templates="{a|b|c} {{ name }}"))
    for key, row in few.items():
        assert more[key]["prompt"] in (row["prompt"], "c" + row["prompt"][1:])


@FEW
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 5))
def test_balance_gives_each_class_its_target(small: int, target: int, large: int) -> None:
    rows = [{"key": f"a{n}", "name": "x", "label": "a"} for n in range(small)]
    rows += [{"key": f"b{n}", "name": "x", "label": "b"} for n in range(small * large)]
    balance = {"column": "label", "target": target}
    tree = {"from": rows, "templates": TEMPLATES, "fields": FIELDS, "balance": balance}
    made = rows_of(tree)
    labels = [row["label"] for row in made.values()]
    assert labels.count("a") == labels.count("b") == target
    assert_same(
        made, rows_of({**{k: v for k, v in tree.items() if k != "balance"}, "variants": 20})
    )
