"""Converts Arrow values of any type to JSON values and back.

Bytes become base64. Times, dates, decimals and UUIDs become text, durations numbers in their unit.
A time or date that text cannot express exactly (a date outside the years 1 to 9999, a time outside
one day) becomes the number that Arrow stores. A struct whose fields share a name becomes a list of
its values, a map a list of pairs. NaN and the infinities become null, and text that is not UTF-8
gets replacement characters.
"""

from __future__ import annotations

import base64
import itertools
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86_400


def to_json(array: pa.Array) -> list[Any]:
    """The values in a form that ``json.dumps`` accepts; null is None."""
    kind, types = array.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        if isinstance(kind, pa.UuidType):
            return _each(array.storage.to_pylist(), lambda one: str(uuid.UUID(bytes=one)))
        return to_json(array.storage)
    if types.is_dictionary(kind):
        return to_json(array.dictionary_decode())
    if types.is_struct(kind):
        return _structs(array)
    if types.is_map(kind):
        return _lists(array, array.values, _pairs)
    if _is_list(kind):
        return _lists(array, array.values, to_json)
    if types.is_time(kind):
        return _each(_stored(array).to_pylist(), lambda one: _time_text(one, kind.unit))
    if types.is_timestamp(kind) or types.is_date(kind):
        return _dates(array)
    if types.is_duration(kind):
        return list(_stored(array).to_pylist())
    if types.is_decimal(kind):
        return list(array.cast(pa.string()).to_pylist())
    if _is_text(kind):
        values = array.cast(pa.large_binary()).to_pylist()
        return _each(values, lambda one: one.decode(errors="replace"))
    if _is_bytes(kind):
        return _each(array.to_pylist(), lambda one: base64.b64encode(one).decode())
    values = array.to_pylist()
    if types.is_floating(kind):
        return _each(values, lambda one: one if math.isfinite(one) else None)
    return list(values)


def from_json(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The inverse of ``to_json`` for an array of this type, except for what that loses.

    Raises:
        Whatever Python and Arrow raise for values that do not fit the type.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        if isinstance(kind, pa.UuidType):
            stored = pa.array(_each(values, lambda one: uuid.UUID(one).bytes), kind.storage_type)
        else:
            stored = from_json(values, kind.storage_type)
        return pa.ExtensionArray.from_storage(kind, stored)
    if types.is_dictionary(kind):
        words = from_json(values, kind.value_type).dictionary_encode()
        indices = words.indices.cast(kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, words.dictionary, ordered=kind.ordered)
    if types.is_struct(kind):
        return _structs_of(values, kind)
    if types.is_map(kind) or _is_list(kind):
        return _lists_of(values, kind)
    if types.is_time(kind):
        return _counted(_each(values, lambda one: _time_count(one, kind.unit)), kind)
    if types.is_timestamp(kind) or types.is_date(kind):
        return _dates_of(values, kind)
    if types.is_duration(kind):
        return _counted(values, kind)
    if types.is_decimal(kind):
        return pa.array(values, pa.string()).cast(kind)
    if _is_text(kind):
        whole = pa.large_string() if types.is_large_string(kind) else pa.string()
        return pa.array(values, whole).cast(kind)
    if _is_bytes(kind):
        decoded = _each(values, lambda one: base64.b64decode(one, validate=True))
        fixed = types.is_fixed_size_binary(kind) or types.is_large_binary(kind)
        return pa.array(decoded, kind if fixed else pa.binary()).cast(kind)
    return pa.array(values, kind)


def _each(values: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    return [None if value is None else change(value) for value in values]


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in (*tests, types.is_binary_view))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    views = (types.is_list_view, types.is_large_list_view)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(test(kind) for test in (*lists, *views))


def _stored(array: pa.Array) -> pa.Array:
    """Times, dates and durations as the numbers that Arrow stores."""
    return array.view(pa.int32() if array.type.bit_width == 32 else pa.int64())


def _counted(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The inverse of ``_stored``."""
    return pa.array(values, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


# Times and dates


def _time_text(count: int, unit: str) -> str | int:
    """``HH:MM:SS``, with a fraction of 6 or 9 digits if needed."""
    seconds, part = divmod(count, _PER_SECOND[unit])
    if not 0 <= seconds < _DAY_S:
        return count
    text = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    nanoseconds = part * (10**9 // _PER_SECOND[unit])
    if not nanoseconds:
        return text
    return f"{text}.{nanoseconds:09d}".removesuffix("000")


def _time_count(value: str | int, unit: str) -> int:
    if isinstance(value, int):
        return value
    whole, _, part = value.partition(".")
    hours, minutes, seconds = map(int, whole.split(":"))
    count = (hours * 3600 + minutes * 60 + seconds) * _PER_SECOND[unit]
    return count + int(part.ljust(9, "0")) // (10**9 // _PER_SECOND[unit]) if part else count


def _dates(array: pa.Array) -> list[Any]:
    """ISO 8601 text as Arrow writes it, or the stored number if the text is not exact."""
    try:
        texts = array.cast(pa.string())
        exact = pc.equal(texts.cast(array.type), array)
    except pa.ArrowException:  # a single value that it cannot convert fails the complete cast
        if len(array) == 1:
            return list(_stored(array).to_pylist())
        return list(itertools.chain(*(_dates(array.slice(at, 1)) for at in range(len(array)))))
    told = zip(texts.to_pylist(), exact.to_pylist(), _stored(array).to_pylist(), strict=True)
    return [text if same else number for text, same, number in told]


def _dates_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    numbers = [value if isinstance(value, int) else None for value in values]
    texts = [None if isinstance(value, int) else value for value in values]
    read = pa.array(texts, pa.string()).cast(kind)
    if all(number is None for number in numbers):
        return read
    return pc.coalesce(read, _counted(numbers, kind))


# Nested values


def _structs(array: pa.StructArray) -> list[Any]:
    names = [field.name for field in array.type]
    columns = [to_json(array.field(place)) for place in range(len(names))]
    rows = zip(*columns, strict=True) if names else itertools.repeat((), len(array))
    alike = len(set(names)) < len(names)
    told = [list(row) if alike else dict(zip(names, row, strict=True)) for row in rows]
    there = array.is_valid().to_pylist()
    return [one if valid else None for one, valid in zip(told, there, strict=True)]


def _structs_of(values: Sequence[Any], kind: pa.StructType) -> pa.Array:
    fields = list(kind)
    if not fields:
        return pa.array(values, kind)
    alike = len({field.name for field in fields}) < len(fields)
    keys = [place if alike else field.name for place, field in enumerate(fields)]
    columns = [
        from_json([None if one is None else one[key] for one in values], field.type)
        for key, field in zip(keys, fields, strict=True)
    ]
    return pa.StructArray.from_arrays(columns, fields=fields, mask=_nulls(values))


def _pairs(entries: pa.StructArray) -> list[list[Any]]:
    return list(map(list, zip(*map(to_json, entries.flatten()), strict=True)))


def _lists(
    array: pa.Array, items: pa.Array, told: Callable[[pa.Array], list[Any]]
) -> list[list[Any] | None]:
    """Each list of the array, with its items converted by ``told``."""
    starts, stops = _bounds(array)
    first, last = min(starts, default=0), max(stops, default=0)
    there = array.is_valid().to_pylist()
    values = told(items.slice(first, last - first))
    return [
        values[start - first : stop - first] if valid else None
        for start, stop, valid in zip(starts, stops, there, strict=True)
    ]


def _bounds(array: pa.Array) -> tuple[list[int], list[int]]:
    """Where the items of each list begin and end."""
    types = pa.types
    if types.is_fixed_size_list(array.type):
        size = array.type.list_size
        starts = [(array.offset + place) * size for place in range(len(array))]
        return starts, [start + size for start in starts]
    offsets = array.offsets.to_pylist()
    if types.is_list_view(array.type) or types.is_large_list_view(array.type):
        sizes = array.sizes.to_pylist()
        return offsets, [start + size for start, size in zip(offsets, sizes, strict=True)]
    return offsets[:-1], offsets[1:]


def _lists_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    types, mask = pa.types, _nulls(values)
    if types.is_fixed_size_list(kind):
        items = [one for value in values for one in _fixed(value, kind.list_size)]
        return pa.FixedSizeListArray.from_arrays(
            from_json(items, kind.value_type), type=kind, mask=mask
        )
    items = [one for value in values if value is not None for one in value]
    sizes = [len(value or ()) for value in values]
    large = types.is_large_list(kind) or types.is_large_list_view(kind)
    counts = pa.int64() if large else pa.int32()
    offsets = pa.array(itertools.accumulate(sizes, initial=0), counts)
    if types.is_map(kind):
        keys, inside = (from_json([one[at] for one in items], found) for at, found in _parts(kind))
        return pa.MapArray.from_arrays(offsets, keys, inside, kind, mask=mask)
    inner = from_json(items, kind.value_type)
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        views = pa.LargeListViewArray if large else pa.ListViewArray
        return views.from_arrays(offsets[:-1], pa.array(sizes, counts), inner, kind, mask=mask)
    lists = pa.LargeListArray if large else pa.ListArray
    return lists.from_arrays(offsets, inner, kind, mask=mask)


def _parts(kind: pa.MapType) -> Iterable[tuple[int, pa.DataType]]:
    return enumerate((kind.key_type, kind.item_type))


def _fixed(value: Sequence[Any] | None, size: int) -> Sequence[Any]:
    if value is None:
        return (None,) * size
    if len(value) != size:
        raise ValueError(f"got a list of {len(value)} values; expected {size}")
    return value


def _nulls(values: Sequence[Any]) -> pa.Array:
    return pa.array([value is None for value in values], pa.bool_())
