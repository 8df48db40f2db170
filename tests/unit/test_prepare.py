"""Rows become samples, or are rejected one by one with a reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.plan.checks import settle
from batchgen.plan.keys import is_safe
from batchgen.plan.plan import Plan
from batchgen.records import ShardRows, derive_seed
from batchgen.shard.prepare import Prepared, prepare
from tests.datasets_on_disk import MODEL, model_for, png, spec_for, text_column

OVERRIDES = ("seed", "num_inference_steps", "guidance_scale", "width", "height")


def settled(columns: tuple[str, ...] = (), **dotted: Any) -> Plan:
    """A plan of no files; each named part is mapped to a column of its own name."""
    mapped = {f"input__columns__{part}": part for part in columns}
    spec = spec_for("in", **mapped, **dotted)
    model = model_for(spec)
    return Plan(settle(spec, model), model, (), (), 0)


def image_spec(columns: tuple[str, ...] = (), **dotted: Any) -> Plan:
    return settled(("image", *columns), task="image-to-image", **dotted)


def shard_of(
    columns: dict[str, Any], variants: int = 1, first: int = 0, stop: int | None = None
) -> ShardRows:
    """Samples ``first`` to ``stop`` of a dataset, with the rows that they need."""
    whole = pa.table(columns)
    stop = whole.num_rows * variants if stop is None else stop
    rows = range(first // variants, -(-stop // variants))
    return ShardRows(
        shard=0,
        first_sample=first,
        stop_sample=stop,
        table=whole.slice(rows.start, len(rows)),
        source_ids=tuple(f"a.parquet#{row}" for row in rows),
        row_keys=tuple(f"a-{row:08d}" for row in rows),
        read_bytes=0,
    )


def prepared(columns: dict[str, Any], plan: Plan) -> Prepared:
    return prepare(shard_of(columns, plan.spec.variants), plan)


def reasons(result: Prepared) -> list[tuple[str, str]]:
    return [(one.source_id, one.reason) for one in result.dropped]


def test_a_row_without_overrides_takes_the_spec() -> None:
    plan = settled(sampling__guidance_scale=2.0, sampling__negative_prompt="blur")
    (sample,) = prepared({"prompt": ["a cat"]}, plan).samples
    assert (sample.key, sample.source_id) == ("a-00000000-v0", "a.parquet#0")
    assert (sample.prompt, sample.negative_prompt) == ("a cat", "blur")
    call = sample.call
    assert (call.num_inference_steps, call.guidance_scale, call.strength) == (5, 2.0, None)
    assert (call.width, call.height) == (16, 8)


def test_a_row_overrides_the_spec_where_it_is_not_null() -> None:
    columns = {
        "prompt": ["a", "b"],
        "negative_prompt": ["", None],
        "seed": pa.array([7, None], pa.int64()),
        "num_inference_steps": pa.array([9, None], pa.int32()),
        "guidance_scale": pa.array([1.5, None]),
        "width": pa.array([64, None], pa.uint16()),
        "height": pa.array([32, None], pa.int64()),
    }
    plan = settled((*OVERRIDES, "negative_prompt"), sampling__negative_prompt="blur")
    one, two = prepared(columns, plan).samples
    assert (one.seed, one.negative_prompt) == (7, "")
    call = one.call
    assert (call.num_inference_steps, call.guidance_scale) == (9, 1.5)
    assert (call.width, call.height) == (64, 32)
    assert two.negative_prompt == "blur"
    assert (two.call.num_inference_steps, two.call.width, two.call.height) == (5, 16, 8)
    assert two.seed == derive_seed(0, two.key)


BAD = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than 9223372036854775808"),
    ("num_inference_steps", 0, "greater than or equal to 1"),
    ("num_inference_steps", 1001, "less than or equal to 1000"),
    ("guidance_scale", -1.0, "greater than or equal to 0"),
    ("guidance_scale", math.nan, "a number"),
    ("guidance_scale", math.inf, "a number"),
    ("width", 20, "multiple of 8"),
    ("height", 8200, "less than or equal to 4096"),
]


@pytest.mark.parametrize(("part", "value", "allowed"), BAD)
def test_a_bad_value_rejects_its_row_alone(part: str, value: Any, allowed: str) -> None:
    kind = pa.array([value]).type if value != 2**63 else pa.uint64()
    columns = {"prompt": ["a", "b", "c"], part: pa.array([None, value, None], kind)}
    result = prepared(columns, settled((part,), variants=2))
    assert [sample.source_id for sample in result.samples] == ["a.parquet#0"] * 2 + [
        "a.parquet#2"
    ] * 2
    assert reasons(result) == [("a.parquet#1", f"bad-{part}")] * 2
    message = result.dropped[0].message
    assert f"column {part!r} holds {value!r}" in message
    assert allowed in message


def test_a_bad_value_names_the_column_not_the_part() -> None:
    plan = settled(input__columns__seed="lucky number")
    result = prepared({"prompt": ["a"], "lucky number": [-5]}, plan)
    assert result.dropped[0].message.startswith("column 'lucky number' holds -5; allowed: ")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [(None, "null-prompt"), ("", "empty-prompt"), (" \t\n ", "empty-prompt")],
)
def test_a_prompt_is_needed(prompt: str | None, reason: str) -> None:
    columns = {"text": pa.array(["fine", prompt], pa.string())}
    result = prepared(columns, settled(input__columns__prompt="text"))
    assert len(result.samples) == 1
    assert reasons(result) == [("a.parquet#1", reason)]
    assert "column 'text'" in result.dropped[0].message
    assert result.dropped[0].outcome == "rejected"


def test_a_prompt_is_passed_on_as_it_is() -> None:
    texts = ["  spaces kept ", "emoji 🐈", "line\nbreak", "null\x00byte"]
    result = prepared({"prompt": texts}, settled())
    assert [sample.prompt for sample in result.samples] == texts


@pytest.mark.parametrize("part", ["prompt", "negative_prompt", "key"])
def test_text_that_is_not_utf8_rejects_its_row_alone(part: str) -> None:
    columns = {"prompt": pa.array(["a", "b", "c"]), part: text_column([b"x", b"caf\xe9", b"z"])}
    result = prepared(columns, settled((part,)))
    assert [sample.source_id for sample in result.samples] == ["a.parquet#0", "a.parquet#2"]
    assert reasons(result) == [("a.parquet#1", "not-utf8")]
    assert f"column {part!r} holds b'caf\\xe9'" in result.dropped[0].message


def test_keys_come_from_their_column_made_safe() -> None:
    columns = {"prompt": ["a"] * 3, "key": ["plain", "a/../b.png", "x y"]}
    keys = [sample.key for sample in prepared(columns, settled(("key",))).samples]
    assert keys[0] == "plain-v0"
    assert all("/" not in key and "." not in key and " " not in key for key in keys)
    assert len(set(keys)) == 3


def test_integer_keys() -> None:
    columns = {"prompt": ["a", "b"], "key": [12, -12]}
    one, two = (sample.key for sample in prepared(columns, settled(("key",))).samples)
    assert one == "12-v0"
    assert two != one


def test_a_null_key_is_rejected_under_a_name_of_its_own() -> None:
    columns = {"prompt": ["a"] * 3, "key": pa.array([None, "k", None])}
    result = prepared(columns, settled(("key",), variants=2))
    assert [one.reason for one in result.dropped] == ["null-key"] * 4
    assert len({one.key for one in result.dropped}) == 4


def test_no_key_meets_that_of_a_null_or_of_text_that_is_not_utf8() -> None:
    """After a successful run ``verify`` reported that keys occur twice."""
    raw = [b"\xff", b"b'\\xff'", None, b"null-key-a-00000002", b"a\xffb", b"a\xfeb"]
    named = text_column([one or b"" for one in raw])
    keys = pa.chunked_array([named.slice(0, 2), pa.nulls(1, pa.string()), named.slice(3)])
    columns = {"prompt": pa.array(["a"] * 6), "key": keys.combine_chunks()}
    result = prepared(columns, settled(("key",)))
    found = [one.key for one in (*result.samples, *result.dropped)]
    assert len(found) == len(set(found)) == 6
    assert all(is_safe(key) for key in found)
    texts = [key.removesuffix("-v0") for key in found]
    again = prepared({"prompt": ["a"] * 6, "key": texts}, settled(("key",)))
    assert {one.key for one in again.samples} & set(found) == {"null-key-a-00000002-v0"}


def test_the_rows_own_seed_is_the_first_variants() -> None:
    columns = {"prompt": ["a", "b"], "seed": [5, 5], "key": ["x", "y"]}
    result = prepared(columns, settled(("seed", "key"), variants=3, seed=1))
    seeds = {sample.key: sample.seed for sample in result.samples}
    assert seeds["x-v0"] == seeds["y-v0"] == 5
    assert seeds["x-v2"] == derive_seed(5, "x-v2")
    derived = [seed for key, seed in seeds.items() if not key.endswith("v0")]
    assert len(set(derived)) == 4
    assert 5 not in derived


def test_seeds_depend_on_run_seed_and_key_alone_and_do_not_repeat() -> None:
    columns = {"prompt": ["same prompt"] * 500}
    seeds = {
        run: [sample.seed for sample in prepared(columns, settled(variants=4, seed=run)).samples]
        for run in (0, 1)
    }
    assert len(set(seeds[0] + seeds[1])) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds[0])
    others = {"prompt": ["another"] * 500}
    assert [s.seed for s in prepared(others, settled(variants=4)).samples] == seeds[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 8))
def test_variants_are_split_over_shard_borders(rows: int, variants: int, size: int) -> None:
    columns = {"prompt": [f"p{row}" if row % 3 else "" for row in range(rows)]}
    plan = settled(variants=variants)
    found: list[tuple[str, int]] = []
    for first in range(0, rows * variants, size):
        stop = min(first + size, rows * variants)
        result = prepare(shard_of(columns, variants, first, stop), plan)
        made = [(one.source_id, one.variant) for one in (*result.samples, *result.dropped)]
        assert len(made) == stop - first
        found += made
    assert sorted(found) == [
        (f"a.parquet#{row}", v) for row in range(rows) for v in range(variants)
    ]


def test_a_sample_is_the_same_in_whatever_shard_it_lies() -> None:
    columns = {"prompt": ["a", "b", "c"]}
    plan = settled(variants=4)
    whole = {sample.key: sample for sample in prepared(columns, plan).samples}
    for sample in prepare(shard_of(columns, 4, 6, 9), plan).samples:
        twin = whole[sample.key]
        assert (sample.seed, sample.prompt, sample.call) == (twin.seed, twin.prompt, twin.call)
        assert sample.row == twin.row - 1  # its place in its own shard's table


nasty_text = st.none() | st.sampled_from(["", " ", "\x00", "a/b", "é🐈", "x" * 300]) | st.text()
nasty_rows = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": nasty_text,
            "negative_prompt": nasty_text,
            "key": nasty_text,
            "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
            "num_inference_steps": st.none() | st.integers(-1, 1001),
            "guidance_scale": st.none() | st.floats(),
            "strength": st.none() | st.floats(width=32),
            "width": st.none() | st.sampled_from([0, 8, 12, 16, 4096, 4104, -8]),
            "height": st.none() | st.sampled_from([8, 16]),
            "image": st.sampled_from([None, b"", b"junk", png(3, 5), png()[:40]]),
        }
    ),
    min_size=1,
    max_size=6,
)
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "negative_prompt": pa.string(),
        "key": pa.string(),
        "seed": pa.int64(),
        "num_inference_steps": pa.int64(),
        "guidance_scale": pa.float64(),
        "strength": pa.float64(),
        "width": pa.int64(),
        "height": pa.int64(),
        "image": pa.binary(),
    }
)


@settings(max_examples=150, deadline=None)
@given(nasty_rows, st.integers(1, 3), st.booleans())
def test_every_planned_sample_is_made_or_dropped(
    rows: list[dict[str, Any]], variants: int, images: bool
) -> None:
    everything = (*OVERRIDES, "negative_prompt", "key")
    text, image = (
        settled(everything, variants=variants),
        image_spec((*everything, "strength"), variants=variants),
    )
    plan = image if images else text
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    result = prepare(
        shard_of({name: table[name] for name in SCHEMA.names}, plan.spec.variants), plan
    )
    outcomes = [(one.source_id, one.variant) for one in (*result.samples, *result.dropped)]
    assert sorted(outcomes) == [
        (f"a.parquet#{row}", v) for row in range(len(rows)) for v in range(plan.spec.variants)
    ]
    assert all(one.reason and one.message for one in result.dropped)
    for sample in result.samples:
        call = sample.call
        assert sample.prompt.strip()
        assert 1 <= call.num_inference_steps <= 1000
        assert math.isfinite(call.guidance_scale)
        assert call.width % 8 == call.height % 8 == 0
        if images:
            assert result.images["image"][sample.row].shape == (call.height, call.width, 3)
            assert call.strength is not None
            assert 0 < call.strength <= 1


@pytest.mark.parametrize("as_struct", [False, True])
def test_image_rows(as_struct: bool) -> None:
    data = [png(8, 8, (255, 0, 0)), None, b"", b"garbage", png()[:30]]
    values = pa.array([{"bytes": one, "path": None} for one in data] if as_struct else data)
    result = prepared({"prompt": ["p"] * 5, "image": values}, image_spec())
    assert [sample.row for sample in result.samples] == [0]
    assert list(result.images["image"]) == [0]
    assert result.images["image"][0].shape == (8, 16, 3)
    assert np.array_equal(
        np.unique(result.images["image"][0].reshape(-1, 3), axis=0), [[255, 0, 0]]
    )
    assert [reason for _, reason in reasons(result)] == [
        "null-image",
        "null-image",
        "undecodable-image",
        "undecodable-image",
    ]


def test_an_image_is_decoded_once_for_all_variants_at_its_rows_size() -> None:
    columns = {"prompt": ["p", "q"], "image": [png(), png()], "width": pa.array([24, None])}
    result = prepared(columns, image_spec(("width",), variants=3))
    assert len(result.samples) == 6
    assert {row: image.shape for row, image in result.images["image"].items()} == {
        0: (8, 24, 3),
        1: (8, 16, 3),
    }


def test_images_without_prompts() -> None:
    plan = image_spec(input__columns__prompt=None)
    (sample,) = prepared({"image": [png()]}, plan).samples
    assert (sample.prompt, sample.call.strength) == ("", 0.6)


def test_a_strength_that_leaves_no_step() -> None:
    columns = {"prompt": ["a", "b"], "image": [png()] * 2, "strength": [0.19, 0.2]}
    result = prepared(columns, image_spec(("strength",)))
    assert [sample.call.strength for sample in result.samples] == [0.2]
    assert reasons(result) == [("a.parquet#0", "strength-too-low")]
    assert "0.19 leaves none of 5 steps" in result.dropped[0].message


BOX = [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        ["a star"],
        [None],
        [{"phrase": " ", "box": BOX}],
        [{"phrase": "a star", "box": BOX[:3]}],
        [{"phrase": "a star", "box": [0.5, 0.1, 0.1, 0.5]}],
        [{"phrase": "a star", "box": [0.1, 0.1, math.nan, 0.5]}],
        [{"phrase": "a star", "box": ["left", "top", "right", "bottom"]}],
    ],
)
def test_wrong_regions_cost_their_row_alone(wrong: Any) -> None:
    model = replace(MODEL, settings=("regions",))
    spec = settle(spec_for("in", task="control", input__columns__regions="regions"), model)
    right = [{"phrase": "a star", "box": BOX}]
    for value in (wrong, right):
        columns = {"prompt": ["a"], "regions": pa.array([value])}
        result = prepare(shard_of(columns), Plan(spec, model, (), (), 0))
        assert len(result.samples) == (value is right)
        assert [one.reason for one in result.dropped] == ([] if value is right else ["bad-regions"])


def test_an_image_that_would_become_too_large_costs_its_row_alone() -> None:
    plan = image_spec(conditioning__resize="multiple-of")
    columns = {"prompt": ["p", "p"], "image": [png(4200, 16), png(40, 16)]}
    result = prepared(columns, plan)
    assert [one.reason for one in result.dropped] == ["image-too-large"]
    assert [(one.call.width, one.call.height) for one in result.samples] == [(40, 16)]


@pytest.mark.parametrize("part", ["prompt", "negative_prompt"])
def test_a_text_of_megabytes_costs_its_row_and_is_not_shown(part: str) -> None:
    columns = {"prompt": ["a cat"] * 2, part: ["a" * 10_000, "a" * 3_000_000]}
    result = prepared(columns, settled(tuple(columns)))
    assert len(result.samples) == 1
    assert [one.reason for one in result.dropped] == [f"long-{part}"]
    assert result.dropped[0].message == (
        f"column {part!r} holds 3000000 characters; allowed: up to 10000"
    )


def test_a_long_value_is_shortened_in_its_message() -> None:
    columns = {"prompt": ["a cat"], "scheduler": ["x" * 9000]}
    (one,) = prepared(columns, settled(tuple(columns))).dropped
    assert one.reason == "bad-scheduler" and len(one.message) < 1000
