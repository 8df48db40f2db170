"""Image folder: one file per image in a folder per label, with the columns in a JSON Lines file."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.labels.columns import OBJECTS
from batchgen.output.formats import json_rows
from batchgen.output.formats.format import DataFile, chosen, loading, schema_file, schema_of
from batchgen.output.formats.json_objects import (
    field_types,
    rest_column,
    with_nulls,
    without_nulls,
)
from batchgen.output.ledger import DATA
from batchgen.plan.keys import safe_key
from batchgen.spec.spec import Spec
from batchgen.storage import Store

UNLABELLED = "images"
METADATA = "metadata.jsonl"
_NAME = re.compile(r"data/[^/]+/(\d{5,})/[^/]+")
_RESERVED = {UNLABELLED, "con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}
_NO_TEXT = b"\xff"  # not UTF-8, so that no other label has the same digest
_MARKED = re.compile(r"-u[0-9a-f]+$", re.IGNORECASE)
# Hugging Face opens the files that columns with such names contain.
_TAKEN = ("file_name", "file_names")
_MASK_FILE = f"{json_rows.MASK}_file_name"
# A PNG under a name that torchvision's ImageFolder does not take for an image of the class, and
# Hugging Face's does for an image: its metadata can name no file outside of its folder.
_MASK_END = ".seg.apng"


@dataclass(frozen=True)
class ImageFolder:
    """The format ``image-folder``: ``data/<label>/<shard>/<key>.png`` and ``metadata.jsonl``.

    The first folder is the class, as in torchvision's ImageFolder; ``metadata.jsonl`` is the file
    of Hugging Face's ImageFolder. A shard's metadata is written after its images. Label masks are
    next to them, ``<key>.seg.apng``; ``label_mask_file_name`` names them.

    ``portable``: labels that differ only in upper and lower case get different folder names, and
    no folder has a name that Windows reserves for a device. The first outputs do not have this.
    """

    portable: bool = True

    def data_files(self) -> str:
        return "data/**"

    def how_to_load(self, spec: Spec, names: Sequence[str] = ()) -> str:
        shown = 'images[0]["image"], images[0]["prompt"]'
        return loading("imagefolder", self.data_files(), shown, "label", names)

    def file_name(self, shard: int, shards: int) -> str | None:
        return None

    def is_ours(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def shard_of(self, name: str, shards: int) -> int | None:
        found = _NAME.fullmatch(name)
        shard = int(found.group(1)) if found else -1
        return shard if 0 <= shard < shards and f"{shard:05d}" == name.split("/")[2] else None

    def files(self, table: pa.Table, shard: int, shards: int) -> Iterator[DataFile]:
        yield schema_file(table.schema)
        names = _outside_names(table.column_names)
        lines: dict[str, list[bytes]] = {}
        masked = json_rows.is_masked(table.schema)
        types, rest = field_types(table.schema), rest_column(table.column_names)
        for row, path, image, mask in json_rows.samples(table):
            folder = f"{DATA}/{label_folder(row['label'], self.portable)}/{shard:05d}"
            yield DataFile(f"{folder}/{path}", image, 0)
            shown = {"file_name": path, **{names[name]: value for name, value in row.items()}}
            if types:
                shown[OBJECTS], shown[rest] = without_nulls(row[OBJECTS], types)
                if shown[rest] is None:
                    del shown[rest]
            if masked:
                shown[_MASK_FILE] = None if mask is None else f"{row['key']}{_MASK_END}"
            if mask is not None:
                yield DataFile(f"{folder}/{row['key']}{_MASK_END}", mask, 0)
            lines.setdefault(folder, []).append(json_rows.line(shown) + b"\n")
        for folder, each in sorted(lines.items()):
            yield DataFile(f"{folder}/{METADATA}", b"".join(each), len(each))

    def read(self, files: Mapping[str, bytes], columns: Container[str] | None = None) -> pa.Table:
        rows = _rows_by_image(files)
        order = [name for name in files if name in rows]  # samples are in the order of the images
        schema = schema_of(files)
        names, schema = _outside_names(schema.names), chosen(schema, columns)
        types, rest = field_types(schema), rest_column(list(names))
        inside = [
            {name: rows[image][shown] for name, shown in names.items() if shown in rows[image]}
            for image in order
        ]
        if types:
            for row, image in zip(inside, order, strict=True):
                row[OBJECTS] = with_nulls(row[OBJECTS], rows[image].get(rest), types)
        images = [{"bytes": files[name], "path": posixpath.basename(name)} for name in order]
        masks = [
            files[mask] if (mask := _mask_of(name, rows[name])) is not None else None
            for name in order
        ]
        return json_rows.table_of(inside, images, schema, masks)

    def schema(self, files: Mapping[str, bytes]) -> pa.Schema:
        return schema_of(files)

    def peek(self, store: Store, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        left = count
        for name in names:
            if posixpath.basename(name) == METADATA and left:
                lines = store.read(name).splitlines()[:left]
                left -= len(lines)
                for row in map(json.loads, lines):
                    path = posixpath.join(posixpath.dirname(name), row["file_name"])
                    yield {**row, "image": store.read(path)}


def label_folder(label: Any, portable: bool = True) -> str:
    """A label of any type as a folder name, which depends only on the label.

    With ``portable``, the name of a label with capital letters ends in ``u`` and a hexadecimal
    number whose bits, from the lowest, say which letters are capitals: ``Cat-u1``, ``CAT-u7``.
    ``cat`` is unchanged.
    """
    if label is None:
        return UNLABELLED
    text = label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)
    name = safe_key(text)
    if not portable or name != text:  # a changed name ends in a digest, so it is unique
        return name
    if name in _RESERVED or _MARKED.search(name):
        return f"{name}-{safe_key(text.encode() + _NO_TEXT).rpartition('-')[2]}"
    capitals = sum(1 << place for place, letter in enumerate(name) if letter.isupper())
    return f"{name}-u{capitals:x}" if capitals else name


def _outside_names(names: Sequence[str]) -> dict[str, str]:
    """Column -> its name in the metadata; a name that means a file name there gets a ``_``."""
    outside: dict[str, str] = {}
    for name in names:
        taken = name in _TAKEN or name.endswith(tuple(f"_{one}" for one in _TAKEN))
        shown = f"{name}_" if taken else name
        while shown != name and shown in names:
            shown += "_"
        outside[name] = shown
    return outside


def _rows_by_image(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Name of the image -> its row; checks that every image has a row and is in its folder."""
    rows: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        folder, base = posixpath.split(name)
        for row in map(json.loads, data.splitlines() if base == METADATA else ()):
            image = f"{folder}/{row['file_name']}"
            if image in rows:
                raise ValueError(f"{image} is listed twice in its {METADATA}")
            if image not in files:
                raise ValueError(f"{image} is in its {METADATA}, but is not a file of the shard")
            _refuse_other_folder(image, row["label"])
            rows[image] = row
    masks = {mask for image, row in rows.items() if (mask := _mask_of(image, row)) is not None}
    for mask in masks:
        if mask not in files:
            raise ValueError(f"{mask} is in its {METADATA}, but is not a file of the shard")
    for name in files:
        is_image = name.startswith(f"{DATA}/") and posixpath.basename(name) != METADATA
        if is_image and name not in rows and name not in masks:
            raise ValueError(f"{name} is not listed in the {METADATA} of its folder")
    return rows


def _mask_of(image: str, row: Mapping[str, Any]) -> str | None:
    """The name of an image's label mask; None if it has none that is a file."""
    named = row.get(_MASK_FILE)
    if named is None:
        return None
    mask = f"{posixpath.splitext(image)[0]}{_MASK_END}"
    if named != posixpath.basename(mask):
        raise ValueError(f"the label mask of {image} is {named!r}, which is not its name")
    return mask


def _refuse_other_folder(image: str, label: Any) -> None:
    folder = image.split("/")[1]
    if folder not in (label_folder(label), label_folder(label, portable=False)):
        raise ValueError(f"{image} is not in the folder of its label {label!r}")
