"""Converts samples to JSON rows and separate images, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.output.formats.json_values import from_json, to_json
from batchgen.plan.keys import is_safe

EXTENSIONS = ("png", "jpg", "webp")


def samples(table: pa.Table) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """For each sample: its columns (except the image) as JSON values, image file name and bytes.

    Raises:
        InputError: a key or file name that a run would not give, and that must not become a path.
    """
    others = table.drop_columns(["image"])
    columns = {
        name: [value for chunk in others.column(name).chunks for value in to_json(chunk)]
        for name in others.column_names
    }
    for index in range(table.num_rows):
        image = table.column("image")[index].as_py()  # one at a time: they are large
        row = {name: values[index] for name, values in columns.items()}
        yield row, file_name(row["key"], image["path"]), image["bytes"]


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
) -> pa.Table:
    """The inverse of ``samples``: the table. Raises KeyError if a row lacks a column."""
    arrays = [
        pa.array(images, field.type)
        if field.name == "image"
        else from_json([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
