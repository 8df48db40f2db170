"""Reads the rows that a recipe starts from: Parquet files, a list in the recipe, or classes."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.labels.columns import IMAGE, object_fields
from batchgen.plan.columns import largest_row, plain_table, plain_type, python_values
from batchgen.plan.keys import row_key, safe_key
from batchgen.spec.sections import Columns
from batchgen.spec.tasks import is_image
from batchgen.storage import Stat, find_files, open_input
from batchgen.storage.publish import place_of

_BATCH_ROWS = 2048
_BATCH_BYTES = 16 << 20
_MOST_BYTES = 64 << 20
_WHOLE = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://|/|data:)")
_CATEGORY = {"category", "category_id"}
_IMAGES = ("image", "mask", "label_mask")


@dataclass(frozen=True)
class Batch:
    """Rows of the source in order.

    Attributes:
        table: their columns.
        names: file and row of each.
        keys: None for a key that is null.
        categories: column of objects -> names of their categories, if these are numbers.
    """

    table: pa.Table
    names: list[str]
    keys: list[str | None]
    categories: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """What the metadata of a source says about its columns.

    Attributes:
        parts: part of ``input.columns`` -> column.
        features: column -> its feature, as `datasets` writes it.
        categories: batchgen's list of categories of objects, if there is one.
        mask_classes: that of the classes in label masks.
        source: what a COCO file says of itself.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    categories: Any = None
    mask_classes: Any = None
    source: Any = None

    def object_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the categories of a column of objects, in the order of their numbers."""
        if self.parts.get("objects") == column and isinstance(self.categories, list):
            named = [one.get("name") for one in self.categories if isinstance(one, Mapping)]
            if len(named) == len(self.categories):
                return tuple(map(str, named))
        return _label_names(self.features.get(column))

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of the classes in a column, if it is a ClassLabel."""
        feature = self.features.get(column)
        names = feature.get("names") if isinstance(feature, Mapping) else None
        fits = isinstance(names, list) and all(isinstance(one, str) for one in names)
        return tuple(names) if fits and names else None


@dataclass(frozen=True)
class Source:
    """Rows that can be read several times, in the same order."""

    place: str
    schema: pa.Schema
    declared: Declared
    key: str | None
    files: tuple[Stat, ...] = ()
    base: str = ""
    table: pa.Table | None = None

    @property
    def key_column(self) -> str | None:
        """The column that names a row: the one of the recipe, else the one declared, else key."""
        if self.key is not None:
            return self.key
        named = self.declared.parts.get("key", "key")
        return named if named in self.schema.names else None

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Read the rows, in batches of bounded size; image paths become absolute.

        Raises:
            InputError: a file is missing, was changed, or cannot be decoded.
        """
        names = list(self.schema.names if columns is None else columns)
        read = list(dict.fromkeys([*names, *filter(None, [self.key_column])]))
        if self.table is not None:
            yield self._batch(self.table.select(read), names, "row", 0)
            return
        for stat in self.files:
            at = 0
            name = posixpath.relpath(stat.path, self.base) if self.base else stat.path
            for table in _tables(stat, self.place, read):
                yield self._batch(table, names, name, at)
                at += table.num_rows

    def _batch(self, table: pa.Table, names: list[str], file: str, first: int) -> Batch:
        numbers = range(first, first + table.num_rows)
        column = self.key_column
        keys: list[str | None] = [row_key(file, number) for number in numbers]
        if column is not None:
            given = python_values(table.column(column))
            keys = [None if one is None else _key(one) for one in given]
        kept = self.with_places(table.select(names))
        categories = {name: self.declared.object_names(name) for name in self.objects}
        return Batch(kept, [f"{file}#{number}" for number in numbers], keys, categories)

    @property
    def objects(self) -> list[str]:
        """The columns of labelled objects: structs of lists, or lists of structs."""
        fields = {one.name: object_fields(one.type) for one in self.schema}
        return [name for name, found in fields.items() if found and _CATEGORY & set(found)]

    def with_places(self, table: pa.Table) -> pa.Table:
        """Make relative paths of images absolute: they start at the folder of the source."""
        if not self.base:
            return table
        for number, one in enumerate(table.schema):
            if self.is_image(one.name):
                values = values_of(table, one.name, self.place)
                moved = _absolute(one.type, values, self._folder)
                if moved is not None:
                    table = table.set_column(number, one, moved)
        return table

    def is_image(self, column: str) -> bool:
        """Whether a column holds images: it is declared, or has their type and name."""
        kind = self.schema.field(column).type
        if kind == IMAGE:
            return True
        parts = [part for part, name in self.declared.parts.items() if name == column]
        named = any(is_image(part) or part in _IMAGES for part in parts) or column in _IMAGES
        return named and (pa.types.is_string(kind) or pa.types.is_large_string(kind))

    @property
    def _folder(self) -> str:
        return (
            place_of(self.base, self.place) if "://" in self.place else os.path.abspath(self.base)
        )


def parquet_source(path: str, key: str | None = None) -> Source:
    """Open Parquet files.

    Raises:
        InputError: no file, not Parquet, files with different columns, or no such key column.
    """
    base, files = find_files(path)
    schema = None
    for stat in files:
        try:
            with open_input(stat.path, path, stat.etag) as file:
                found = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{stat.path} is not a complete Parquet file: {error}; `batchgen import` makes "
                "Parquet of other formats"
            ) from error
        twice = [name for name in found.names if found.names.count(name) > 1]
        if twice:
            raise InputError(f"{stat.path} has two columns {twice[0]!r}")
        plain = pa.schema([one.with_type(plain_type(one.type)) for one in found], found.metadata)
        if schema is not None and not plain.equals(schema):
            raise InputError(f"{stat.path} has other columns than {files[0].path}")
        schema = schema or plain
    assert schema is not None
    _check_key(key, schema, path)
    return Source(path, schema, declared(schema), key, tuple(files), base or "")


def listed_source(rows: Sequence[Any], key: str | None, place: str) -> Source:
    """Make rows of a list in the recipe: names of classes, or mappings from column to value.

    Raises:
        InputError: a row is neither, or its values have different types.
    """
    tables = [{"name": one, "label": one} if isinstance(one, str) else dict(one) for one in rows]
    if not tables:
        raise InputError(f"{place}: the list has no rows")
    names = list(dict.fromkeys(name for one in tables for name in one))
    if not names:
        tables, names = [{"row": number} for number in range(len(tables))], ["row"]
    columns = {name: [one.get(name) for one in tables] for name in names}
    try:
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(f"{place}: values of one column must have one type: {error}") from error
    if key is None and "key" not in names and "name" in names:
        named = columns["name"]
        if all(isinstance(one, str) for one in named) and len(set(named)) == len(named):
            key = "name"
    _check_key(key, table.schema, place)
    return Source(place, table.schema, Declared(), key, table=table)


def declared(schema: pa.Schema) -> Declared:
    """Read the metadata of a source; what is not well-formed is left out."""
    metadata = schema.metadata or {}
    parts, features, more = {}, {}, {}
    try:
        own = json.loads(metadata.get(b"batchgen", b"{}"))
        known = [*Columns.model_fields]
        parts = {
            part: name
            for part, name in own.get("columns", {}).items()
            if part in known and name in schema.names
        }
        more = {name: own.get(name) for name in ("categories", "mask_classes", "source")}
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    try:
        given = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        features = {name: one for name, one in given.items() if name in schema.names}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return Declared(parts, features, **more)


def _label_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the ClassLabel of ``category``, at any depth of a feature."""
    if isinstance(feature, list):
        feature = feature[0] if feature else None
    if not isinstance(feature, Mapping):
        return None
    names = feature.get("names")
    if isinstance(names, list) and all(isinstance(one, str) for one in names):
        return tuple(names)
    inner = [feature[name] for name in _CATEGORY if name in feature] or [feature.get("feature")]
    return _label_names(inner[0])


def _tables(stat: Stat, url: str, columns: list[str]) -> Iterator[pa.Table]:
    try:
        with open_input(stat.path, url, stat.etag) as raw:
            file = pq.ParquetFile(raw, pre_buffer=False)
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                usual = _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)
                most = _MOST_BYTES // max(1, largest_row(raw, facts, columns))
                size = int(min(_BATCH_ROWS, max(1, min(usual, most))))
                for batch in file.iter_batches(
                    size, row_groups=[group], columns=columns, use_threads=False
                ):
                    yield plain_table(pa.Table.from_batches([batch]).select(columns))
    except FileNotFoundError as error:
        raise InputError(f"{stat.path} was removed meanwhile") from error
    except pa.ArrowException as error:
        raise InputError(f"{stat.path} cannot be decoded: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{stat.path} cannot be decoded: {error}") from error  # a damaged page


def values_of(table: pa.Table, column: str, place: str) -> list[Any]:
    """Read the values of a column of images.

    Raises:
        InputError: a path is not UTF-8.
    """
    try:
        values: list[Any] = table.column(column).to_pylist()
    except UnicodeDecodeError:
        raise InputError(f"{place}: column {column!r} has a path that is not UTF-8") from None
    return values


def _absolute(kind: pa.DataType, column: list[Any], folder: str) -> pa.ChunkedArray | None:
    """Make relative paths absolute; None if there are none."""
    is_struct = pa.types.is_struct(kind)
    paths = [one and one["path"] for one in column] if is_struct else column
    if not any(path and not _WHOLE.match(path) for path in paths):
        return None
    whole = [
        path
        if not path or _WHOLE.match(path)
        else posixpath.normpath(f"{folder}/{path}")
        if "://" not in folder
        else f"{folder}/{path}"
        for path in paths
    ]
    if is_struct:
        made = [one and {**one, "path": path} for one, path in zip(column, whole, strict=True)]
        return pa.chunked_array([pa.array(made, kind)])
    return pa.chunked_array([pa.array(whole, kind)])


def _key(value: object) -> str:
    return safe_key(value if isinstance(value, str | bytes) else str(value))


def _check_key(key: str | None, schema: pa.Schema, place: str) -> None:
    if key is not None and key not in schema.names:
        raise InputError(
            f"key: there is no column {key!r} in {place}; its columns: {', '.join(schema.names)}"
        )
