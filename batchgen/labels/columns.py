"""The label columns of an output: their Arrow types, features and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from batchgen.labels.objects import LabelObject
from batchgen.labels.row import RowLabels

OBJECTS = "objects"
DIGITS, FIT_DIGITS = 4, 9  # of pixels: without the last bits of the arithmetic
_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
_NUMBERS = pa.list_(pa.float64())
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TRUTH = pa.schema(
    [
        pa.field("labels_are", pa.string()),
        pa.field("objects_dropped", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("source_height", pa.int32()),
        pa.field("fit", pa.list_(pa.float64())),
    ]
)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), DIGITS) for value in values]


# Field of an object -> its type in the output and its value.
_FIELDS: dict[str, tuple[pa.DataType, Callable[[LabelObject], Any]]] = {
    "area": (pa.float64(), lambda one: None if one.area is None else round(one.area, DIGITS)),
    "iscrowd": (pa.int8(), lambda one: one.iscrowd),
    "segmentation": (
        pa.list_(_NUMBERS),
        lambda one: [_rounded(polygon) for polygon in one.polygons] or None,
    ),
    "rle": (
        _RLE,
        lambda one: one.rle and {"size": list(one.rle.size), "counts": one.rle.counts},
    ),
    "keypoints": (
        _NUMBERS,
        lambda one: [value for point in one.keypoints for value in _rounded(point)] or None,
    ),
    "num_keypoints": (pa.int32(), lambda one: sum(seen > 0 for *_, seen in one.keypoints)),
}
_CATEGORIES = ("category", "category_id")


def object_fields(kind: pa.DataType) -> dict[str, pa.DataType] | None:
    """Field -> type of one value, of a column of objects; None if it is of another type.

    Args:
        kind: a struct of lists, or a list of structs.
    """
    types = pa.types
    if _is_list(kind) and types.is_struct(kind.value_type):
        return {field.name: field.type for field in kind.value_type}
    if types.is_struct(kind) and all(_is_list(field.type) for field in kind):
        return {field.name: field.type.value_type for field in kind}
    return None


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def objects_type(kind: pa.DataType, named: bool = False) -> pa.StructType:
    """The output's type for a source column of objects: a struct of one list for each field.

    ``named``: the names of the categories are known, so that the objects have their numbers.
    """
    given = object_fields(kind) or {}
    category = next((given[name] for name in _CATEGORIES if name in given), pa.int64())
    text = not named and not pa.types.is_integer(category)
    fields = {"bbox": _NUMBERS, "category": pa.string() if text else pa.int64()}
    for name, one in given.items():
        if name == "segmentation" and pa.types.is_struct(one):
            fields["rle"] = _RLE
        elif name in _FIELDS:
            fields[name] = _FIELDS[name][0]
        elif name not in ("bbox", *_CATEGORIES):
            fields[name] = one
    return pa.struct([(name, pa.list_(one)) for name, one in fields.items()])


def objects_value(objects: Sequence[LabelObject], kind: pa.StructType) -> dict[str, list[Any]]:
    """The objects of one image as a value of ``objects_type``."""
    return {field.name: list(_values(objects, field.name)) for field in kind}


def _values(objects: Sequence[LabelObject], name: str) -> Iterator[Any]:
    for one in objects:
        if name == "bbox":
            yield _rounded(one.box)
        elif name == "category":
            yield one.category
        elif name in _FIELDS:
            yield _FIELDS[name][1](one)
        else:
            yield one.others.get(name)


def objects_feature(kind: pa.StructType, names: Sequence[str] | None) -> dict[str, Any]:
    """The Hugging Face feature of such a column; ``category`` is a ClassLabel if names are known.

    Form: `datasets` 4, ``Features.to_dict``.
    """
    features = {field.name: _feature(field.type) for field in kind}
    if names and pa.types.is_integer(kind.field("category").type.value_type):
        label = {"names": list(names), "_type": "ClassLabel"}
        features["category"] = {"feature": label, "_type": "List"}
    return features


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if _is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    name = {"double": "float64", "float": "float32"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def labels_schema(objects: pa.DataType | None, mask: bool, named: bool = False) -> pa.Schema:
    """The label columns: of objects of this source type, of label masks, and what they are."""
    columns = list(TRUTH)
    if objects is None:
        columns = [field for field in columns if field.name != "objects_dropped"]
    if objects is not None:
        columns.insert(0, pa.field(OBJECTS, objects_type(objects, named)))
    if mask:
        columns.insert(0, pa.field("label_mask", IMAGE))
    return pa.schema(columns)


def labels_table(rows: Sequence[RowLabels | None], schema: pa.Schema) -> pa.Table:
    """A table of ``labels_schema`` with one row for each row of a shard; None gives nulls."""
    return pa.table(
        {field.name: pa.array([_cell(one, field) for one in rows], field.type) for field in schema},
        schema=schema,
    )


def _cell(row: RowLabels | None, field: pa.Field) -> Any:
    if row is None:
        return None
    if field.name == OBJECTS:
        return None if row.objects is None else objects_value(row.objects, field.type)
    if field.name == "label_mask":
        return None if row.mask is None else {"bytes": row.mask.png(), "path": None}
    return {
        "labels_are": row.are,
        "objects_dropped": row.dropped,
        "source_width": row.source and row.source[0],
        "source_height": row.source and row.source[1],
        "fit": row.fit and [round(value, FIT_DIGITS) for value in row.fit.numbers],
    }[field.name]


def mark_crowd(
    objects: pa.ChunkedArray, failed: Sequence[Sequence[bool] | None]
) -> pa.ChunkedArray:
    """Set ``iscrowd`` of the objects that failed.

    Args:
        objects: a column of the output (n rows); its objects have the field ``iscrowd``.
        failed: for each row, whether each of its objects failed; None if none did.
    """
    rows = objects.to_pylist()
    for row, verdicts in zip(rows, failed, strict=True):
        if row is not None and verdicts is not None:
            pairs = zip(row["iscrowd"], verdicts, strict=True)
            row["iscrowd"] = [1 if is_failed else before for before, is_failed in pairs]
    return pa.chunked_array([pa.array(rows, objects.type)])
