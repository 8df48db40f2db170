"""Parquet and Arrow files, as Hugging Face datasets are stored: rows are copied as they are.

Keys, a column of the split, and the parts of a run are added.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.importing.listing import Listing, row_keys
from batchgen.importing.records import IMAGES, LABEL, OBJECTS, PROMPTS, SETTINGS, SPLIT
from batchgen.importing.rows import (
    KEY,
    Columns,
    Dataset,
    Item,
    Kind,
    Options,
    Place,
    Reject,
    is_objects,
)
from batchgen.importing.splits import split_in
from batchgen.labels.columns import IMAGE
from batchgen.plan.columns import plain_table, plain_type
from batchgen.plan.keys import safe_key

ENDINGS = (".parquet", ".arrow")
_BATCH_ROWS = 1024
_BATCH_BYTES = 64 << 20
_LIKE_IMAGES = ("image", "img", "pixel_values", "photo", "picture")
_LIKE_MASKS = ("label_mask", "seg", "segmentation", "annotation", "mask")

Batches = Iterator[pa.Table]


def fits(listing: Listing) -> bool:
    return bool(listing.named(*ENDINGS))


def read(listing: Listing, options: Options) -> Dataset:
    """Read all Parquet files of the source, or all Arrow files that `save_to_disk` wrote."""
    names = listing.named(".parquet") or [
        name for name in listing.named(".arrow") if not name.rpartition("/")[2].startswith("cache-")
    ]
    schema = _schema(listing, names[0])
    for name in names[1:]:
        other = _schema(listing, name)
        if [(one.name, one.type) for one in other] != [(one.name, one.type) for one in schema]:
            raise InputError(
                f"{name} has other columns than {names[0]}; all files of a source need the same: "
                f"{', '.join(schema.names)}"
            )
    splits = {name: split_in(name) for name in names}
    split_of = splits if all(splits.values()) else {}
    tables = [Part(name, split_of.get(name), partial(_batches, listing, name)) for name in names]
    return dataset_from(schema, tables)


@dataclass(frozen=True)
class Part:
    """One file of rows: its name, its split, and a function that starts to read it."""

    name: str
    split: str | None
    batches: Callable[[], Batches]


def dataset_from(schema: pa.Schema, parts: list[Part]) -> Dataset:
    """Tables of one schema as a dataset, with keys, splits and the parts of a run."""
    features, told = features_in(schema), _told(schema)
    schema = pa.schema([one.with_type(plain_type(one.type)) for one in schema])
    adds_split = SPLIT not in schema.names and any(one.split for one in parts)
    kept = [one.remove_metadata() for one in schema if one.name != KEY]
    if adds_split:
        kept.append(pa.field(SPLIT, pa.string()))
    names = _class_names(features, schema)
    guessed = _parts(pa.schema(kept), features)
    objects = names.get(guessed.get(OBJECTS, OBJECTS), ())
    columns = Columns(
        pa.schema(kept),
        names,
        guessed | told.get("columns", {}),
        tuple(told.get("categories") or ({"name": name} for name in objects)),
        {name: one for name, one in told.items() if name not in ("columns", "categories")},
        {one.name: features[one.name] for one in kept if one.name in features},
    )
    has_keys = KEY in schema.names
    items = _items(parts, columns.schema, has_keys, adds_split)
    return Dataset(columns, items, unique=not has_keys)


def _items(
    parts: list[Part], schema: pa.Schema, has_keys: bool, adds_split: bool
) -> Iterator[Item]:
    for part in parts:
        row = 0
        try:
            for table in part.batches():
                table = plain_table(table)
                if adds_split:
                    table = table.append_column(
                        SPLIT, pa.array([part.split] * table.num_rows, pa.string())
                    )
                yield from _keyed(table.select([*schema.names]), table, part, row, has_keys)
                row += table.num_rows
        except (pa.ArrowException, OSError) as error:
            message = f"{part.name}: damaged after {row:,} rows ({str(error).splitlines()[0]})"
            yield Reject(Place(part.name, f"after row {row}"), "damaged-file", message)


def _keyed(
    table: pa.Table, given: pa.Table, part: Part, first: int, has_keys: bool
) -> Iterator[Item]:
    """The rows with their keys, made safe; rows whose key is null are refused."""
    if has_keys:
        values = given.column(KEY).to_pylist()
        keys = [None if value is None else safe_key(_key_text(value)) for value in values]
    else:
        key_of = row_keys(part.name)
        keys = [key_of(first + at) for at in range(table.num_rows)]
    for at, key in enumerate(keys):
        if key is None:
            message = f"{part.name} row {first + at}: the key is null; needed: a key for each row"
            yield Reject(Place(part.name, f"row {first + at}"), "bad-value", message)
    column = pa.array(keys, pa.string())
    yield table.add_column(0, KEY, column).filter(column.is_valid())


def _key_text(value: Any) -> str | bytes:
    return value if isinstance(value, str | bytes) else str(value)


def _schema(listing: Listing, name: str) -> pa.Schema:
    try:
        with listing.open(name) as file:
            if name.lower().endswith(".arrow"):
                return pa.ipc.open_stream(file).schema
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} is not a complete file: {error}") from error


def _batches(listing: Listing, name: str) -> Batches:
    with listing.open(name) as file:
        if name.lower().endswith(".arrow"):
            for batch in pa.ipc.open_stream(file):
                yield pa.Table.from_batches([batch])
            return
        parquet = pq.ParquetFile(file, pre_buffer=False)
        rows = _batch_rows(parquet.metadata)
        for batch in parquet.iter_batches(rows, use_threads=False):
            yield pa.Table.from_batches([batch])


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """How many rows to read at once, so that they take a bounded number of bytes."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    per_row = max((one.total_byte_size // max(1, one.num_rows) for one in groups), default=1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, per_row)))


def features_in(schema: pa.Schema) -> dict[str, Any]:
    """The Hugging Face features in a schema's metadata; empty if they cannot be read."""
    try:
        tree = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return dict(tree)
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def _told(schema: pa.Schema) -> dict[str, Any]:
    """What an earlier import says about the columns; empty for other files."""
    try:
        tree = json.loads((schema.metadata or {})[b"batchgen"])
        columns = {part: one for part, one in tree["columns"].items() if one in schema.names}
        return {**tree, "columns": columns}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _class_names(features: Mapping[str, Any], schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Column -> the names of its classes, as the features declare them."""
    found = {}
    for name in schema.names:
        inner = features.get(name)
        if isinstance(inner, dict) and is_objects(schema.field(name).type):
            inner = inner.get("category")
            inner = inner.get("feature") if isinstance(inner, dict) else None
        names = inner.get("names") if isinstance(inner, dict) else None
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = tuple(names)
    return found


def _parts(schema: pa.Schema, features: Mapping[str, Any]) -> dict[str, str]:
    """Part of a run -> column, by names, types and features."""
    texts = [one.name for one in schema if pa.types.is_string(one.type) or _is_large(one.type)]
    images = [one.name for one in schema if _is_image(one, features)]
    parts = {KEY: KEY} | {name: name for name in SETTINGS if name in schema.names}
    parts |= {name: name for name in IMAGES if name in images}
    image = next((name for name in _LIKE_IMAGES if name in images), None)
    others = [name for name in images if name not in _LIKE_MASKS]
    if image or len(others) == 1:
        parts["image"] = image or others[0]
    mask = next((name for name in _LIKE_MASKS[:-1] if name in images), None)
    parts |= {"label_mask": mask} if mask else {}
    prompt = next((name for name in PROMPTS if name in texts), None)
    parts |= {"prompt": prompt} if prompt else {}
    parts |= {"negative_prompt": "negative_prompt"} if "negative_prompt" in texts else {}
    label = next((name for name in (LABEL, "labels", "fine_label") if name in schema.names), None)
    if label and not pa.types.is_nested(schema.field(label).type):
        parts[LABEL] = label
    objects = [one.name for one in schema if is_objects(one.type)]
    parts |= {OBJECTS: objects[0]} if len(objects) == 1 else {}
    return parts


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind))


def _is_image(field: pa.Field, features: Mapping[str, Any]) -> bool:
    told = features.get(field.name)
    return field.type == IMAGE or (isinstance(told, dict) and told.get("_type") == "Image")


KIND = Kind("parquet", "a Hugging Face dataset folder: Parquet or Arrow files", fits, read)
