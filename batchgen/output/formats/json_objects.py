"""Writes the objects of an image as JSON without nulls in its lists, which readers misread.

pyarrow's JSON reader, on which Hugging Face's ImageFolder is built, loses nulls at the beginning of
a list (seen in version 26), so that values move to other objects. A missing polygon or list of
keypoints becomes an empty list, and a missing mask an empty struct. A field with a missing number
or text is written as text in a column of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.labels.columns import OBJECTS, object_fields

REST = f"{OBJECTS}_with_nulls"


def field_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Field -> type of one value of the column ``objects``; empty if it is no struct of lists."""
    if OBJECTS not in schema.names or not pa.types.is_struct(schema.field(OBJECTS).type):
        return {}
    return object_fields(schema.field(OBJECTS).type) or {}


def rest_column(names: Sequence[str]) -> str:
    """The name of the column of fields with nulls, which no other column has."""
    name = REST
    while name in names:
        name += "_"
    return name


def without_nulls(
    value: Mapping[str, Any] | None, types: Mapping[str, pa.DataType]
) -> tuple[dict[str, Any] | None, str | None]:
    """The objects without nulls, and the fields for which that is not possible, as JSON text."""
    if value is None:
        return None, None
    shown: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, values in value.items():
        empty = _empty(types[name])
        if values is None or empty in values or (None in values and empty is None):
            rest[name] = values
        else:
            shown[name] = [empty if one is None else one for one in values]
    return shown, json.dumps(rest, ensure_ascii=False) if rest else None


def with_nulls(
    shown: Mapping[str, Any] | None, rest: str | None, types: Mapping[str, pa.DataType]
) -> dict[str, Any] | None:
    """The inverse of ``without_nulls``. Raises KeyError if a field is missing."""
    if shown is None:
        return None
    others = json.loads(rest) if rest else {}
    whole: dict[str, Any] = {}
    for name, kind in types.items():
        if name in others:
            whole[name] = others[name]
        else:
            empty = _empty(kind)
            whole[name] = [
                None if empty is not None and one == empty else one for one in shown[name]
            ]
    return whole


def _empty(kind: pa.DataType) -> Any:
    """What is written for a missing value of this type; None if there is nothing."""
    if pa.types.is_struct(kind):
        return {}
    lists = (pa.types.is_list(kind), pa.types.is_large_list(kind))
    return [] if any(lists) else None
