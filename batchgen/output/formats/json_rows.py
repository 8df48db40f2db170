"""Converts samples to JSON rows and separate images, and back."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.labels.columns import IMAGE
from batchgen.output.formats.json_values import from_json, to_json
from batchgen.plan.keys import is_safe

EXTENSIONS = ("png", "jpg", "webp")
MASK = "label_mask"
_PNG = b"\x89PNG\r\n\x1a\n"


class JsonSample(NamedTuple):
    """One sample as a JSON row and files.

    Attributes:
        row: its columns, except those that are files.
        path: the name of its image file.
        image: the bytes of that file.
        mask: the bytes of its label mask, a PNG; None if the row has the column, or none is there.
    """

    row: dict[str, Any]
    path: str
    image: bytes
    mask: bytes | None = None


def samples(table: pa.Table) -> Iterator[JsonSample]:
    """The samples of a shard. A label mask that is a PNG in memory becomes a file of its own.

    Raises:
        InputError: a key or file name that a run would not give, and that must not become a path.
    """
    masked = is_masked(table.schema)
    others = table.drop_columns(["image", MASK] if masked else ["image"])
    columns = {
        name: [value for chunk in others.column(name).chunks for value in to_json(chunk)]
        for name in others.column_names
    }
    for index in range(table.num_rows):
        image = table.column("image")[index].as_py()  # one at a time: they are large
        row = {name: values[index] for name, values in columns.items()}
        mask = None
        if masked:
            value = table.column(MASK)[index].as_py()
            mask = _png_of(value)
            if mask is None:
                (row[MASK],) = to_json(pa.array([value], table.schema.field(MASK).type))
        yield JsonSample(row, file_name(row["key"], image["path"]), image["bytes"], mask)


def is_masked(schema: pa.Schema) -> bool:
    """Whether the table has label masks, whose PNG files can be files of their own."""
    return MASK in schema.names and schema.field(MASK).type == IMAGE


def _png_of(value: Mapping[str, Any] | None) -> bytes | None:
    """The bytes of a label mask as a run writes it; None for any other value."""
    if value is None or value["path"] is not None or not (value["bytes"] or b"").startswith(_PNG):
        return None
    return bytes(value["bytes"])


def file_name(key: str, path: str) -> str:
    """The name of an image's file; raises InputError unless a run would give it this name."""
    stem, _, extension = path.partition(".")
    if stem != key or not is_safe(stem) or extension not in EXTENSIONS:
        raise InputError(
            f"image {path!r} of key {key!r} does not have the name that a run gives it"
        )
    return path


def line(row: Mapping[str, Any]) -> bytes:
    """One row as JSON text."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def table_of(
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    masks: Sequence[bytes | None] = (),
) -> pa.Table:
    """The inverse of ``samples``: the table.

    Raises:
        KeyError: a row lacks a column.
        ValueError: a row has a label mask twice, as a file and as a column.
    """
    masked = is_masked(schema)
    arrays = []
    for field in schema:
        if field.name == "image":
            arrays.append(pa.array(images, field.type))
        elif field.name == MASK and masked:
            pairs = zip(rows, masks, strict=True)
            arrays.append(from_json([_mask_value(*pair) for pair in pairs], field.type))
        else:
            arrays.append(from_json([row[field.name] for row in rows], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _mask_value(row: Mapping[str, Any], mask: bytes | None) -> Any:
    """The value of a label mask as JSON."""
    if mask is None:
        return row[MASK]
    if MASK in row:
        raise ValueError(f"sample {row['key']} has its {MASK} twice, as a file and as a column")
    return {"bytes": base64.b64encode(mask).decode(), "path": None}
