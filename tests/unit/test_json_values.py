"""Arrow values of every type are converted to JSON and back without a change."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.output.formats.json_values import from_json, to_json
from tests.fuzzing import fuzz


def counted(kind: pa.DataType, most: int, least: int | None = None) -> st.SearchStrategy[pa.Array]:
    """Arrays of a type that stores numbers, from the whole range of numbers."""
    stored = pa.int32() if kind.bit_width == 32 else pa.int64()
    numbers = st.integers(-most if least is None else least, most) | st.integers(-(10**6), 10**6)
    if least is not None:
        numbers = st.integers(least, most)
    lists = st.lists(st.none() | numbers, max_size=6)
    return lists.map(lambda values: pa.array(values, stored).view(kind))


def plain(kind: pa.DataType, one: st.SearchStrategy[Any]) -> st.SearchStrategy[pa.Array]:
    return st.lists(st.none() | one, max_size=6).map(lambda values: pa.array(values, kind))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ZONES = st.sampled_from([None, "UTC", "Europe/Berlin", "+05:30", "No/Where"])
LEAVES = st.one_of(
    st.builds(pa.timestamp, st.sampled_from(["s", "ms", "us", "ns"]), ZONES).flatmap(
        lambda kind: counted(kind, 2**63 - 1)
    ),
    st.sampled_from(["s", "ms", "us", "ns"]).flatmap(
        lambda unit: counted(pa.duration(unit), 2**63 - 1)
    ),
    counted(pa.date32(), 2**31 - 1),
    st.lists(st.none() | st.integers(-(10**9), 10**9), max_size=6).map(
        lambda days: pa.array([d and d * 86_400_000 for d in days], pa.int64()).view(pa.date64())
    ),
    counted(pa.time32("s"), 86_399, 0),
    counted(pa.time32("ms"), 86_399_999, 0),
    counted(pa.time64("us"), 86_399_999_999, 0),
    counted(pa.time64("ns"), 86_399_999_999_999, 0),
    plain(pa.string(), TEXT),
    plain(pa.large_string(), TEXT),
    plain(pa.string_view(), TEXT),
    plain(pa.binary(), st.binary(max_size=5)),
    plain(pa.large_binary(), st.binary(max_size=5)),
    plain(pa.binary_view(), st.binary(max_size=5)),
    plain(pa.binary(3), st.binary(min_size=3, max_size=3)),
    plain(pa.bool_(), st.booleans()),
    plain(pa.int8(), st.integers(-128, 127)),
    plain(pa.uint64(), st.integers(0, 2**64 - 1)),
    plain(pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    plain(pa.float32(), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    plain(pa.float16(), st.floats(width=16, allow_nan=False, allow_infinity=False)),
    plain(pa.decimal128(20, 5), st.decimals(-(10**9), 10**9, places=5)),
    plain(pa.decimal256(50, 2), st.decimals(-(10**9), 10**9, places=2)),
    plain(pa.binary(16), st.binary(min_size=16, max_size=16)).map(
        lambda stored: pa.ExtensionArray.from_storage(pa.uuid(), stored)
    ),
    plain(pa.int8(), st.integers(-128, 127)).map(
        lambda stored: pa.ExtensionArray.from_storage(pa.bool8(), stored)
    ),
    plain(pa.string(), TEXT).map(lambda words: words.dictionary_encode()),
    st.integers(0, 5).map(pa.nulls),
)


def cut(draw: st.DrawFn, items: pa.Array, parts: int) -> tuple[pa.Array, pa.Array]:
    """Offsets that cut the items into lists, and which of the lists are null."""
    inner = draw(st.lists(st.integers(0, len(items)), min_size=parts - 1, max_size=parts - 1))
    offsets = [0, *sorted(inner), len(items)]
    mask = draw(st.lists(st.booleans(), min_size=parts, max_size=parts))
    return pa.array(offsets, pa.int32()), pa.array(mask, pa.bool_())


@st.composite
def nested(draw: st.DrawFn, inside: st.SearchStrategy[pa.Array]) -> pa.Array:
    items = draw(inside)
    form = draw(st.sampled_from(["list", "large", "fixed", "struct", "alike", "map"]))
    parts = draw(st.integers(1, 3))
    if form == "fixed":
        items = items.slice(0, len(items) // parts * parts)
        count = len(items) // parts
        mask = pa.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), pa.bool_())
        return pa.FixedSizeListArray.from_arrays(items, parts, mask=mask)
    if form in ("struct", "alike"):
        size = len(items)
        mask = pa.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), pa.bool_())
        names = ["a", "a"] if form == "alike" else ["a", "b"]
        fields = [pa.field(names[0], items.type), pa.field(names[1], pa.int64())]
        numbers = pa.array(range(size), pa.int64())
        return pa.StructArray.from_arrays([items, numbers], fields=fields, mask=mask)
    offsets, mask = cut(draw, items, parts)
    if form == "map":
        keys = pa.array([str(place) for place in range(len(items))], pa.string())
        return pa.MapArray.from_arrays(offsets, keys, items, mask=mask)
    if form == "large":
        return pa.LargeListArray.from_arrays(offsets.cast(pa.int64()), items, mask=mask)
    return pa.ListArray.from_arrays(offsets, items, mask=mask)


ARRAYS = st.recursive(LEAVES, nested, max_leaves=3)


@fuzz(quick=200)
@given(ARRAYS, st.integers(0, 3))
def test_arrays_of_any_type_survive_json(array: pa.Array, start: int) -> None:
    array = array.slice(start)
    text = json.dumps(to_json(array), allow_nan=False)
    back = from_json(json.loads(text), array.type)
    back.validate(full=True)
    assert back.type == array.type and len(back) == len(array)
    assert to_json(back) == to_json(array)
    assert back.is_valid().equals(array.is_valid())


DAY_NS = 86_400 * 10**9


@pytest.mark.parametrize(
    ("kind", "numbers", "told"),
    [
        (pa.timestamp("us"), [2**60, 0], [2**60, "1970-01-01 00:00:00.000000"]),
        (pa.timestamp("s", "No/Where"), [5, None], [5, None]),
        (pa.date32(), [2**30, 1], [2**30, "1970-01-02"]),
        (
            pa.time64("ns"),
            [1, 1000, 10**9, DAY_NS, -1],
            ["00:00:00.000000001", "00:00:00.000001", "00:00:01", DAY_NS, -1],
        ),
    ],
)
def test_times_that_text_cannot_say_are_numbers(
    kind: pa.DataType, numbers: list[int], told: list[Any]
) -> None:
    """Such a run succeeded but could not be verified, and nanoseconds of a time were lost."""
    array = pa.array(numbers, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)
    assert to_json(array) == told
    assert from_json(told, kind).equals(array)


def test_a_uuid_is_written_as_people_write_it() -> None:
    stored = pa.array([bytes(range(16)), None], pa.binary(16))
    array = pa.ExtensionArray.from_storage(pa.uuid(), stored)
    assert to_json(array) == ["00010203-0405-0607-0809-0a0b0c0d0e0f", None]


def test_fields_of_one_name_stand_in_a_list() -> None:
    columns, fields = [[1], ["x"]], [pa.field("a", pa.int64()), pa.field("a", pa.string())]
    arrays = [pa.array(one, field.type) for one, field in zip(columns, fields, strict=True)]
    assert to_json(pa.StructArray.from_arrays(arrays, fields=fields)) == [[1, "x"]]
