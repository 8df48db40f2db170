"""Writes imported rows to Parquet: in row groups and files of bounded size, all or nothing.

Files are written under a temporary name and renamed at the end; to a store they are uploaded then.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.importing.rows import KEY, Columns
from batchgen.storage import Store, delete_all, open_store, storage_errors
from batchgen.storage.publish import publish

FILE_BYTES = 256 << 20
ROW_GROUP_BYTES = 16 << 20
ROW_GROUP_ROWS = 8192
PARQUET = ".parquet"
REJECTS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source_file", pa.string()),
        pa.field("place", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)
_PART = re.compile(r"part-\d{5,}-of-\d{5,}\.parquet")


@dataclass(frozen=True)
class Target:
    """Where an import is written.

    Attributes:
        store: the folder that holds the target and the list of rejected rows.
        name: the target's name in it: a file, if it ends in ``.parquet``, else a folder.
        file_bytes: the most that a file of a folder may have.
        done: an object of the store that says that another process has written the target.
    """

    store: Store
    name: str
    file_bytes: int = FILE_BYTES
    done: str = ""

    @property
    def url(self) -> str:
        return f"{self.store.url.rstrip('/')}/{self.name}"

    @property
    def is_file(self) -> bool:
        return self.name.lower().endswith(PARQUET)

    @property
    def rejects(self) -> str:
        """The name of the list of rejected rows."""
        stem = self.name[: -len(PARQUET)] if self.is_file else self.name
        return f"{stem}-rejects{PARQUET}"

    def present(self) -> list[str]:
        """The names of what is at the target and its list of rejects, relative to the store."""
        there = self.store.list("")
        found = [one for one in (self.name, self.rejects) if one in there]
        return found + [f"{self.name}/{one}" for one in self.store.find(self.name)] * (
            self.name not in there
        )

    def refuse_unless_free(self, overwrite: bool) -> None:
        """Refuse a target that exists; with ``overwrite`` only one that an import did not write.

        Raises:
            InputError: names what is there.
        """
        found = self.present()
        if found and not overwrite:
            raise InputError(
                f"{self.store.url}/{found[0]} exists; choose another name, or use --overwrite"
            )
        for name in found:
            last = name.rpartition("/")[2]
            if name not in (self.name, self.rejects) and not _PART.fullmatch(last):
                raise InputError(
                    f"{self.url} holds {last}, which an import did not write; choose another name"
                )
            if name == self.name and not self.is_file:
                raise InputError(f"{self.url} is a file; choose another name")

    def clear(self) -> None:
        """Remove an earlier import."""
        delete_all(self.store, self.present())


def target_at(url: str, file_bytes: int = FILE_BYTES) -> Target:
    """The target of this path or URL.

    Raises:
        InputError: it has no name.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    if "://" in url and "/" not in url.partition("://")[2].strip("/"):
        raise InputError(f"target {url}: a bucket; name a file or a folder in it")
    if not name or name in (".", ".."):
        raise InputError(f"target {url!r}: it has no name; name a file .parquet or a folder")
    root = folder or ("/" if url.startswith("/") else ".")
    return Target(open_store(root), name, file_bytes)


class Writing:
    """An import that is being written; it becomes visible with ``finish``.

    A context manager: what was written is removed, if it ends without ``finish``.
    """

    def __init__(self, target: Target, columns: Columns) -> None:
        self._target = target
        self._schema = _schema(columns)
        self._folder = _staging(target)
        self._files: list[Path] = []
        self._writer: _Parquet | None = None
        self._rejects: _Parquet | None = None

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *exc: object) -> None:
        for writer in (self._writer, self._rejects):
            if writer is not None:
                writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the files, with the key and the metadata."""
        return self._schema

    def add(self, table: pa.Table) -> None:
        """Write a table of ``schema`` as row groups of bounded size."""
        per_row = max(1, table.nbytes // max(1, table.num_rows))
        rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // per_row))
        for start in range(0, table.num_rows, rows):
            group = table.slice(start, rows)
            writer = self._writer
            full = writer is not None and writer.size + group.nbytes > self._target.file_bytes
            if writer is not None and full and not self._target.is_file:
                writer.close()
                writer = None
            if writer is None:
                path = self._folder / f"part-{len(self._files):05d}{PARQUET}"
                self._files.append(path)
                writer = self._writer = _Parquet(path, self._schema)
            writer.add(group)

    def reject(self, rows: list[Mapping[str, str]]) -> None:
        """Add rows to the list of rejected ones."""
        if self._rejects is None:
            self._rejects = _Parquet(self._folder / "rejects", REJECTS)
        self._rejects.add(pa.Table.from_pylist([dict(row) for row in rows], schema=REJECTS))

    def finish(self) -> int:
        """Put all files in their places; returns the bytes of the rows' files.

        The list of rejected rows goes first. So where the rows are, the list is complete.
        """
        target = self._target
        if self._writer is not None:
            self._writer.close()
        size = sum(path.stat().st_size for path in self._files)
        folder, _, last = target.done.rpartition("/")
        if last and last in target.store.list(folder):
            return size
        target.clear()
        self.finish_rejects()
        if not self._files:
            return 0
        if target.is_file:
            publish(target.store, str(self._files[0]), target.name)
            return size
        names = [
            f"part-{at:05d}-of-{len(self._files):05d}{PARQUET}" for at in range(len(self._files))
        ]
        if target.store.local:
            self._rename(names)
        else:
            for path, name in zip(self._files, names, strict=True):
                publish(target.store, str(path), f"{target.name}/{name}")
        return size

    def finish_rejects(self) -> None:
        """Put only the list of rejected rows in its place."""
        if self._rejects is not None:
            self._rejects.close()
            publish(self._target.store, str(self._rejects.path), self._target.rejects)

    def _rename(self, names: list[str]) -> None:
        """Give the folder its name, with all files in it."""
        folder = self._folder / "rows"
        folder.mkdir()
        for path, name in zip(self._files, names, strict=True):
            path.rename(folder / name)
        place = self._target.store.path(self._target.name)
        with storage_errors(f"write {place}"):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(folder, place)


class _Parquet:
    """A Parquet file, with image bytes as they are and all else compressed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        leaves = _leaves(schema)
        encoded = [name for name in leaves if not name.endswith(".bytes")]
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression={name: "ZSTD" if name in encoded else "NONE" for name in leaves},
            use_dictionary=encoded,
            write_statistics=encoded,
        )

    @property
    def size(self) -> int:
        """The bytes that are written already."""
        return self._file.tell()

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def close(self) -> None:
        """End the file; on a disk its bytes are flushed."""
        if self._file.closed:
            return
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _staging(target: Target) -> Path:
    """A temporary folder: on the disk of the target, or a local one for a store.

    Its name has the machine and the process, so that those of killed imports are removed.
    """
    if not target.store.local:
        return Path(tempfile.mkdtemp(prefix="batchgen-import-"))
    root = Path(target.store.path(""))
    host = f"{zlib.crc32(socket.gethostname().encode()):08x}"
    start = f".{target.name}.importing-{host}-"
    with storage_errors(f"write {root}"):
        root.mkdir(parents=True, exist_ok=True)
        for old in root.glob(f"{_escaped(start)}*"):
            if not _is_alive(old.name.removeprefix(start)):
                shutil.rmtree(old, ignore_errors=True)
        folder = root / f"{start}{os.getpid()}"
        folder.mkdir()
    return folder


def _escaped(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _is_alive(process: str) -> bool:
    """Whether a process of this number runs."""
    if not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # that of another user
        pass
    return True


def _leaves(schema: pa.Schema) -> list[str]:
    """Dotted names of the Parquet columns in which a schema is stored."""
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    columns = pq.ParquetFile(sink).schema
    return [columns.column(index).path for index in range(len(columns))]


def _schema(columns: Columns) -> pa.Schema:
    """The schema of the files, with Hugging Face's features and batchgen's columns."""
    told: dict[str, Any] = {"columns": dict(columns.parts), **columns.more}
    if columns.categories:
        told["categories"] = [dict(one) for one in columns.categories]
    metadata = {
        "huggingface": json.dumps({"info": {"features": columns.all_features()}}),
        "batchgen": json.dumps(told),
    }
    return pa.schema([pa.field(KEY, pa.string()), *columns.schema], metadata)
