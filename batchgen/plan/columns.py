"""The columns of an input file: their types made plain, and a bound on the size of a row."""

from __future__ import annotations

import io
import json
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_FEATURES = b"huggingface"
_SMALL = 1 << 16  # bytes; a chunk of at most this size is not inspected
_VARINTS = 24  # bytes; enough for the first two fields of a page's header
_SHARING = ("PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY")


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Replace views of text and bytes by text and bytes, at any depth: few kernels take views."""
    types = pa.types
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_map(kind):
        fields = _plain_field(kind.key_field), _plain_field(kind.item_field)
        return pa.map_(*fields, keys_sorted=kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def plain_table(table: pa.Table) -> pa.Table:
    """Cast a table to plain types, with nulls allowed; drops metadata that is not well-formed."""
    fields = [_plain_field(field).with_nullable(True) for field in table.schema]
    return table.cast(pa.schema(fields, _plain_metadata(table.schema.metadata)))


def _plain_metadata(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes] | None:
    """Drop the features metadata of Hugging Face `datasets` if it is not well-formed."""
    if not metadata or _FEATURES not in metadata:
        return metadata
    try:
        features = json.loads(metadata[_FEATURES])["info"]["features"]
        is_sound = features is None or all(
            isinstance(one, dict | list) for one in features.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if is_sound:
        return metadata
    return {name: value for name, value in metadata.items() if name != _FEATURES}


def field_twice(kind: pa.DataType) -> str | None:
    """Find a name that two fields of a struct share, at any depth; None if there is none."""
    fields = [kind.field(number) for number in range(kind.num_fields)]
    if pa.types.is_struct(kind):
        names: list[str] = [field.name for field in fields]
        for name in names:
            if names.count(name) > 1:
                return name
    found = (field_twice(field.type) for field in fields)
    return next((name for name in found if name is not None), None)


def largest_row(file: BinaryIO, group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Bound the bytes that a row of the group can take once decoded.

    A value that is stored once, as in a dictionary, takes its full size in each row that refers to
    it. (Lists are assumed to have the mean number of values.)
    """
    most = 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema.partition(".")[0] not in columns:
            continue
        per_row = -(-max(chunk.num_values, 1) // max(group.num_rows, 1))
        mean = -(-chunk.total_uncompressed_size // max(chunk.num_values, 1))
        is_shared = chunk.physical_type == "BYTE_ARRAY" and any(
            one in _SHARING for one in chunk.encodings
        )
        most += per_row * (_largest_value(file, chunk) if is_shared else mean)
    return most


def _largest_value(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """Bound the size of a value: by its dictionary if it has one, else by the complete chunk."""
    start, whole = chunk.dictionary_page_offset, int(chunk.total_uncompressed_size)
    if start is None or whole <= _SMALL or "DELTA_BYTE_ARRAY" in chunk.encodings:
        return whole
    file.seek(start)
    size = _unpacked_size(file.read(_VARINTS))
    return whole if size is None else size


def _unpacked_size(header: bytes) -> int | None:
    """Read a page's uncompressed size from its header; pyarrow does not expose it.

    Format: Parquet's ``PageHeader`` in Thrift's compact protocol. Its first field is the type of
    page, its second the size; both are i32, so each is 0x15 and a zigzag varint.
    """
    source = io.BytesIO(header)
    value = None
    for _ in range(2):
        if source.read(1) != b"\x15":
            return None
        value = _varint(source)
    return None if value is None else (value >> 1) ^ -(value & 1)


def _varint(source: io.BytesIO) -> int | None:
    value = 0
    for shift in range(0, 35, 7):
        byte = source.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return a column's values; a text that is not valid UTF-8 is returned as bytes."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return [_text_or_bytes(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> the names of its classes, for columns that are declared as ClassLabel."""
    try:
        tree = json.loads((schema.metadata or {}).get(b"huggingface", b""))
    except (ValueError, RecursionError):
        return {}
    for name in ("info", "features"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    features = tree.items() if isinstance(tree, dict) else ()
    return {
        name: [str(one) for one in told["names"]]
        for name, told in features
        if isinstance(told, dict) and isinstance(told.get("names"), list)
    }
