"""Writes the rows of an expansion: one Parquet file, seen complete or not at all, and rejects."""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import SpecError
from batchgen.recipes.sources import Declared
from batchgen.spec.sections import Columns
from batchgen.storage import Store, open_store
from batchgen.storage.publish import publish

GROUP_ROWS = 16_384
GROUP_BYTES = 64 << 20
REJECTS = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "row_key", "source", "reason", "message")),
        ("samples", pa.int64()),
    ]
)
OF_PHOTOS = ("width", "height")  # in most tables those of a photograph, not of the image to make


def rejects_name(name: str) -> str:
    """The name of the file with rejected samples, which is next to that of the rows."""
    stem, dot, end = name.rpartition(".")
    return f"{stem}-rejects.{end}" if dot else f"{name}-rejects.parquet"


@dataclass
class RowWriter:
    """Writes tables to a temporary file, and puts it in its place at the end.

    Args:
        output: path or URL of the Parquet file.
        name: of the file in its store.
        store: that of its folder.
    """

    store: Store
    name: str
    _writer: pq.ParquetWriter | None = None
    _path: str = ""
    _waiting: list[pa.Table] = field(default_factory=list)
    rows: int = 0

    @classmethod
    def open(cls, output: str) -> RowWriter:
        """Open a writer; nothing is created yet.

        Raises:
            SpecError: the path does not end in .parquet.
        """
        folder, name = posixpath.split(output)
        if not name.lower().endswith(".parquet"):
            raise SpecError("output", output, "a path or URL that ends in .parquet")
        return cls(open_store(folder or "."), name)

    def write(self, table: pa.Table) -> None:
        """Add rows; all tables have the columns of the first."""
        if self._writer is None:
            self._path = self._temporary()
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self.rows += table.num_rows
        self._waiting.append(table)
        waiting = sum(one.num_rows for one in self._waiting)
        if waiting >= GROUP_ROWS or sum(one.nbytes for one in self._waiting) >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the rest, and put the file in its place."""
        self._flush()
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        publish(self.store, self._path, self.name)

    def abort(self) -> None:
        """Remove the temporary file."""
        if self._writer is not None:
            self._writer.close()
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    def _flush(self) -> None:
        if self._waiting and self._writer is not None:
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._waiting = []

    def _temporary(self) -> str:
        return _temporary(self.store, self.name)


def write_small(store: Store, name: str, data: bytes) -> None:
    """Write a small file next to the rows, as they are written."""
    path = _temporary(store, name)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(store, path, name)


def _temporary(store: Store, name: str) -> str:
    """Name a file on the same disk as the store; that of a network store is a temporary one."""
    if not store.local:
        return posixpath.join(tempfile.gettempdir(), f"batchgen-{uuid.uuid4().hex}.tmp")
    os.makedirs(store.root, exist_ok=True)
    return posixpath.join(store.root, f".{name}.{uuid.uuid4().hex}.tmp")


def schema_of(
    table: pa.Table,
    declared: Declared,
    carried: Mapping[str, str],
    class_names: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> pa.Schema:
    """Add the metadata by which `run` and `datasets` know the columns.

    A column that the recipe makes is declared by its name. One that is copied is declared as its
    source says; by its name only if the source says nothing at all.

    Args:
        table: the first rows.
        declared: what the source says about its columns.
        carried: column of the source -> its column here, for those that are copied.
        class_names: column of class numbers that the recipe makes -> the names.
    """
    features = {carried[name]: one for name, one in declared.features.items() if name in carried}
    for one in table.schema:
        named = class_names.get(one.name) if pa.types.is_integer(one.type) else None
        label = {"names": list(named), "_type": "ClassLabel"} if named else None
        features[one.name] = label or features.get(one.name) or _feature(one.type)
    parts = {part: carried[name] for part, name in declared.parts.items() if name in carried}
    copied = set(carried.values())
    for name in Columns.model_fields:
        by_name = name not in copied or (not declared.parts and name not in OF_PHOTOS)
        if name in table.column_names and by_name:
            parts[name] = name
    parts.pop("class_label" if "class_label" not in table.column_names else "", None)
    own: dict[str, Any] = {"columns": parts}
    if declared.categories and "objects" in parts:
        own["categories"] = declared.categories
    if declared.mask_classes and "label_mask" in parts:
        own["mask_classes"] = declared.mask_classes
    if declared.source and ("objects" in parts or "label_mask" in parts):
        own["source"] = declared.source
    known = {name: one for name, one in features.items() if one is not None}
    metadata = {
        b"huggingface": json.dumps({"info": {"features": known}}).encode(),
        b"batchgen": json.dumps(own).encode(),
    }
    schema: pa.Schema = table.schema.with_metadata(metadata)
    return schema


def _feature(kind: pa.DataType) -> dict[str, Any] | None:
    """The feature of a simple type, or of images; None for others, which `datasets` derives."""
    if pa.types.is_struct(kind) and {one.name for one in kind} == {"bytes", "path"}:
        return {"_type": "Image"}
    names = {pa.string(): "string", pa.int64(): "int64", pa.int32(): "int32"}
    names |= {pa.float64(): "float64", pa.bool_(): "bool"}
    return {"dtype": names[kind], "_type": "Value"} if kind in names else None
