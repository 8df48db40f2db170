"""Samples as JSON and back; what JSON has no words for is text there."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.writer.tables import COLUMNS

# What verification asks of a sample, whatever else its row has.
VERIFIED = pa.schema(
    [COLUMNS.field(name) for name in ("key", "image", "source_id", "variant", "sha256")]
)


def samples(table: pa.Table) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """Of each sample its columns but the image as JSON values, the image's file name and bytes.

    Bytes become base64; times, dates and decimals text (ISO 8601); durations numbers. NaN and the
    infinities, which JSON lacks, become null; text that is not UTF-8 gets replacement characters.
    """
    others = table.drop_columns(["image"])
    columns = {name: _to_json(others.column(name)) for name in others.column_names}
    for index in range(table.num_rows):
        image = table.column("image")[index].as_py()  # one at a time: they are large
        row = {name: values[index] for name, values in columns.items()}
        yield row, image["path"], image["bytes"]


def line(row: Mapping[str, Any]) -> bytes:
    """One row as JSON text."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def table_of(
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    schema: pa.Schema | None,
) -> pa.Table:
    """The table of which ``samples`` gave the rows. Raises KeyError where a row lacks a column."""
    schema = schema or VERIFIED
    arrays = [
        pa.array(images, field.type)
        if field.name == "image"
        else _from_json([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_json(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return [_plain(value, column.type) for value in column.cast(_stored(column.type)).to_pylist()]


def _from_json(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    array = pa.array([_typed(value, inner) for value in values], _stored(inner)).cast(inner)
    return array if inner == kind else array.dictionary_encode().cast(kind)


def _is_text(kind: pa.DataType) -> bool:
    return any((pa.types.is_string(kind), pa.types.is_large_string(kind)))


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        (types.is_binary(kind), types.is_large_binary(kind), types.is_fixed_size_binary(kind))
    )


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return any((types.is_list(kind), types.is_large_list(kind), types.is_fixed_size_list(kind)))


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type to cast to for Python values that JSON has; text as bytes, which need not be UTF-8.

    Fields keep their names and nullability, as casts between structs demand.
    """
    if _is_text(kind):
        return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    if pa.types.is_duration(kind):
        return pa.int64()
    dated = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    if dated or pa.types.is_decimal(kind):
        return pa.string()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_stored_field(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_stored_field(kind.value_field))
    if pa.types.is_list(kind):
        return pa.list_(_stored_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_stored_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_stored(kind.key_type), _stored(kind.item_type))
    return kind


def _stored_field(field: pa.Field) -> pa.Field:
    return field.with_type(_stored(field.type))


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A Python value of a stored type as JSON has it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if _is_text(kind):
        return value.decode(errors="replace")
    if _is_bytes(kind):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.time):  # Arrow casts it to text, but not back
        return value.isoformat()
    return _within(value, kind, _plain)


def _typed(value: Any, kind: pa.DataType) -> Any:
    """The inverse of ``_plain``, but for what that has lost."""
    if value is None:
        return None
    if _is_text(kind):
        return value.encode()
    if _is_bytes(kind):
        return base64.b64decode(value)
    if pa.types.is_time(kind):
        return datetime.time.fromisoformat(value)
    return _within(value, kind, _typed)


def _within(value: Any, kind: pa.DataType, change: Any) -> Any:
    """A nested value with its parts changed; any other as it is."""
    if _is_list(kind):
        return [change(one, kind.value_type) for one in value]
    if pa.types.is_struct(kind):
        return {field.name: change(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [(change(key, kind.key_type), change(one, kind.item_type)) for key, one in value]
    return value
