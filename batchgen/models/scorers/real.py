"""Features of a set of real images in Parquet files, with which generated images are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, RejectRow
from batchgen.images.source import open_image
from batchgen.stages.scorers.scorer import Array
from batchgen.storage import find_files, open_input

IMAGE = "image"
_CHUNK = 16 << 20
_ROWS = 64  # images in memory at a time


def reference_sha256(path: str, neighbours: int) -> str:
    """SHA-256 of the reference's files, by content, after a check that it has images enough.

    Raises:
        InputError: there is none, it has no column of images, or too few rows.
    """
    digest = hashlib.sha256()
    rows = 0
    for file in _files(path):
        with open_input(file.path, path, file.etag) as handle:
            whole = pq.ParquetFile(handle, pre_buffer=False)
            _check_column(whole.schema_arrow, file.path)
            rows += whole.metadata.num_rows
            handle.seek(0)
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    if rows <= neighbours:
        raise _too_few(path, rows, neighbours)
    return digest.hexdigest()


def _check_column(schema: pa.Schema, path: str) -> None:
    """Refuse a file without a column of images."""
    if IMAGE not in schema.names:
        raise InputError(
            f"score.options.reference: {path} has no column {IMAGE!r}; its columns: "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(IMAGE).type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    content = kind.field("bytes").type if is_struct else kind
    types = pa.types
    if not any(
        one(content) for one in (types.is_binary, types.is_large_binary, types.is_binary_view)
    ):
        raise InputError(
            f"score.options.reference: column {IMAGE!r} in {path} has type {kind}; needed: image "
            "files as bytes, or structs with the field bytes"
        )


def _too_few(path: str, count: int, neighbours: int) -> InputError:
    return InputError(
        f"score.options.reference: {path} has {count} images; needed: more than "
        f"options.neighbours ({neighbours})"
    )


def real_features(options: Any, features: Callable[[Sequence[Array]], list[Array]]) -> Array:
    """The features (n, d) of the reference's images, at most ``options.limit``, evenly chosen.

    Raises:
        InputError: too few images, or one that cannot be read.
    """
    found: list[Array] = []
    batch: list[Array] = []
    for pixels in _images(options.reference, options.limit):
        batch.append(pixels)
        if len(batch) == _ROWS:
            found += features(batch)
            batch = []
    found += features(batch)
    if len(found) <= options.neighbours:
        raise _too_few(options.reference, len(found), options.neighbours)
    return np.stack(found)


def _files(path: str) -> Sequence[Any]:
    return find_files(path)[1]


def _images(path: str, limit: int) -> Iterator[Array]:
    files = _files(path)
    rows = []
    for file in files:
        with open_input(file.path, path, file.etag) as handle:
            rows.append(pq.read_metadata(handle).num_rows)
    total = sum(rows)
    wanted = set(np.linspace(0, total - 1, min(limit, total)).round().astype(int).tolist())
    first = 0
    for file in files:
        with open_input(file.path, path, file.etag) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            for batch in parquet.iter_batches(_ROWS, columns=[IMAGE], use_threads=False):
                for number, value in enumerate(batch.column(0), start=first):
                    if number in wanted:
                        yield _pixels(value, file.path, number)
                first += len(batch)


def _pixels(value: pa.Scalar, path: str, row: int) -> Array:
    try:
        return np.asarray(open_image(value.as_py()))
    except RejectRow as error:
        raise InputError(f"score.options.reference: {path} row {row}: {error}") from error
