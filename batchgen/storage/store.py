"""A store: a folder on any fsspec filesystem. Every write is atomic and of a complete object."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from batchgen.errors import InputError, StorageFailed
from batchgen.storage.connect import filesystem, is_networked, limits
from batchgen.storage.faults import error_code, persist, storage_errors
from batchgen.storage.uploads import put_in_parts
from batchgen.storage.wrapped import WrappedFile

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
TEMPORARY = "_batchgen/tmp"
PROBES = "_batchgen/probe"
RECORD_BYTES = 1 << 30  # far more than any plan, marker, lease or log of a run
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Stat:
    """One object: its full path in the filesystem, size in bytes, and etag or mtime as text."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Store:
    """A folder on some filesystem. Names are relative to it, with forward slashes.

    Writes are atomic: a reader sees the old object, the new one, or none, never a part of one.
    Operations that fail on a network store are retried for ``patience_s``; this is 0 for other
    stores, which raise RetryShard at once. With ``stays`` the folder must exist, see ``in_place``.
    """

    fs: AbstractFileSystem
    root: str
    url: str
    local: bool
    patience_s: float = 0.0
    stays: bool = False

    def path(self, name: str) -> str:
        """Return the path of the object of this name; the root for an empty name.

        Raises:
            InputError: the name leads out of the store, or cannot be a file name.
        """
        parts = name.split("/") if name else []
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise InputError(
                f"{self.url}: {name!r} is not a valid name in it; allowed: parts without '.', '..' "
                "and NUL, with single slashes between them"
            )
        return posixpath.join(self.root, *parts)

    def without_retries(self) -> Store:
        """Return this store without retries; the caller handles every fault."""
        return replace(self, patience_s=0.0)

    def in_place(self) -> Store:
        """Return this store, whose folder exists by now; writes no longer create it.

        If the folder is deleted, writes raise StorageFailed. Otherwise a run would continue into a
        new folder without its plan and earlier shards. Buckets have no folders, so nothing changes
        there.
        """
        return replace(self, stays=True)

    def read(self, name: str) -> bytes:
        """Read a complete object.

        Raises:
            FileNotFoundError: there is no such object.
            InputError: it is a pipe, a device or a folder; reading one may never end.
        """

        def whole() -> bytes:
            data: bytes = self.fs.cat_file(self.path(name))
            return data

        self._refuse_irregular(name)
        return self.attempt(f"read {self.url}/{name}", whole)

    def read_record(self, name: str) -> bytes:
        """Read a complete object as ``read`` does, but refuse a file of more than 1 GiB.

        Raises:
            FileNotFoundError, InputError: as ``read``, and for such a file.
        """
        path = self.path(name)
        if self.local and os.path.isfile(path) and os.path.getsize(path) > RECORD_BYTES:
            raise InputError(
                f"{self.url}/{name} has more than 1 GiB, so batchgen did not write it; remove it"
            )
        return self.read(name)

    def open(self, name: str) -> BinaryIO:
        self._refuse_irregular(name)
        return open_file(self.fs, self.path(name), f"{self.url}/{name}", self.patience_s)

    def put(self, name: str, data: bytes) -> None:
        """Write or replace one object atomically; on a local disk it is also flushed (fsync)."""
        doing = f"write {self.url}/{name}"
        if not self.local:
            with _missing_is_a_bucket(doing):
                if "s3" in self.fs.protocol and len(data) >= 2 * limits().part_bytes:
                    put_in_parts(self, name, data)
                else:
                    self.attempt(doing, partial(self._pipe, name, data))
            return
        with storage_errors(doing):
            with self._temporary(name, data) as temporary:
                os.replace(temporary, self.path(name))
            _flush_folder(os.path.dirname(self.path(name)))

    def put_new(self, name: str, data: bytes) -> bool:
        """Write one object only if there is none of that name; return False if there is one.

        An object with the same content counts as written by this call: an earlier try may have
        succeeded although its answer was lost.
        """
        doing = f"create {self.url}/{name}"
        if not self.local:
            with _missing_is_a_bucket(doing):
                return self.attempt(doing, partial(self._put_new_remote, name, data))
        with storage_errors(doing):
            with self._temporary(name, data) as temporary:
                try:
                    _link_or_copy(temporary, self.path(name), data)
                except FileExistsError:
                    return self.read(name) == data
            _flush_folder(os.path.dirname(self.path(name)))
            return True

    def delete(self, name: str) -> None:
        """Delete one object, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(f"delete {self.url}/{name}", lambda: self.fs.rm_file(self.path(name)))

    def supports_create_only(self) -> bool:
        """Test whether the store honours create-only writes, which leases and markers rely on."""
        if self.local:
            return True
        name = f"{PROBES}/{uuid.uuid4().hex}"
        try:
            self.put_new(name, b"first")
            return not self.put_new(name, b"second") and self.read(name) == b"first"
        finally:
            self.delete(name)

    def find(self, folder: str) -> dict[str, int]:
        """Map the names of all files under ``folder``, with subfolders, to their size in bytes."""

        def found() -> dict[str, int]:
            self.fs.invalidate_cache(self.path(folder))
            return {
                posixpath.relpath(name, self.path(folder)): int(info["size"])
                for name, info in self.fs.find(self.path(folder), detail=True).items()
            }

        return self.attempt(f"list {self.url}/{folder}", found)

    def stats(self) -> dict[str, Stat]:
        """Map every file name to size and etag; if the store's URL names one file, only that file.

        Raises FileNotFoundError if there is neither a file nor a folder.
        """

        def known() -> dict[str, Stat]:
            self.fs.invalidate_cache(self.root)
            info = self.fs.info(self.root)
            if info["type"] == "file":
                return {posixpath.basename(self.root): to_stat(self.root, info)}
            return {
                posixpath.relpath(name, self.root): to_stat(name, info)
                for name, info in self.fs.find(self.root, detail=True).items()
                if info["type"] == "file"
            }

        return self.attempt(f"list {self.url}", known)

    def fetch(self, stat: Stat, path: str) -> None:
        """Download one object to a local file."""
        doing = f"fetch {stat.path} of {self.url}"
        self.attempt(doing, lambda: self.fs.get_file(stat.path, path))

    def list(self, folder: str) -> dict[str, int]:
        """Map the names of the files directly in ``folder`` to their size in bytes."""

        def listed() -> list[dict[str, Any]]:
            self.fs.invalidate_cache(self.path(folder))
            return cast("list[dict[str, Any]]", self.fs.ls(self.path(folder), detail=True))

        try:
            entries = self.attempt(f"list {self.url}/{folder}", listed)
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"]): int(entry["size"])
            for entry in entries
            if entry["type"] == "file"
        }

    def move(self, name: str, to: str) -> None:
        """Rename an object; an object of the new name is replaced."""
        source, target = self.path(name), self.path(to)
        with storage_errors(f"move {self.url}/{name} to {to}"):
            if self.local:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(source, target)
                return
        self.attempt(f"copy {self.url}/{name} to {to}", lambda: self.fs.cp_file(source, target))
        self.delete(name)

    def clear_temporary(self, older_than_s: float) -> None:
        """Delete partly written files of killed runs (local disks only; stores never show them)."""
        if not self.local:
            return
        for name in self.list(TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                age_s = time.time() - os.stat(self.path(f"{TEMPORARY}/{name}")).st_mtime
                if age_s > older_than_s:
                    self.delete(f"{TEMPORARY}/{name}")

    def attempt(self, doing: str, call: Callable[[], T]) -> T:
        """Call, with this store's retries and errors; ``doing`` names the operation in messages."""
        if self.patience_s:
            return persist(doing, call, self.patience_s)
        with storage_errors(doing):
            return call()

    def _refuse_irregular(self, name: str) -> None:
        path = self.path(name)
        if self.local and os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{self.url}/{name} is not a regular file; remove it")

    @contextmanager
    def _temporary(self, name: str, data: bytes) -> Iterator[str]:
        if self.stays and not os.path.isdir(self.root):
            raise StorageFailed(f"{self.url} no longer exists: it was deleted or moved")
        os.makedirs(self.path(TEMPORARY), exist_ok=True)
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        temporary = self.path(f"{TEMPORARY}/{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _put_new_remote(self, name: str, data: bytes) -> bool:
        try:
            self._pipe(name, data, mode="create")
        except FileExistsError:
            return self.read(name) == data
        except OSError as error:
            if error_code(error) not in ("PreconditionFailed", "412"):
                raise
            return self.read(name) == data
        return True

    def _pipe(self, name: str, data: bytes, **options: Any) -> None:
        """Send one request, once, with a time limit: clients' own do not cover a stalled upload."""
        if not self.fs.async_impl:
            self.fs.pipe_file(self.path(name), data, **options)
            return
        from fsspec.asyn import sync

        if "s3" in self.fs.protocol:
            options["chunksize"] = len(data) + 1  # else s3fs starts a multipart upload of its own
        within_s = limits().write_within_s(len(data))
        pipe = self.fs._pipe_file
        sync(self.fs.loop, pipe, self.path(name), data, timeout=within_s, **options)


def open_store(url: str) -> Store:
    """Open the store at ``url``: a local folder or any fsspec URL. Nothing is created yet.

    Raises:
        InputError: the URL is a chain with ``::``, which could be a second name of the same place.
    """
    if "::" in url:
        raise InputError(f"{url}: chained URLs are not allowed; use a folder or a URL without '::'")
    fs, root = filesystem(url)
    root = root.rstrip("/") or "/"
    local = _is_local(fs)
    patience_s = limits().patience_s if is_networked(url) else 0.0
    return Store(fs, root, root if local else url.rstrip("/"), local, patience_s)


def absolute(url: str) -> str:
    """Make a local path absolute, so that it is valid in any working directory."""
    fs, root = filesystem(url)
    return root if _is_local(fs) else url


def is_within(url: str, folder: str) -> bool:
    """Whether ``url`` is ``folder`` or is under it."""
    inner, outer = absolute(url).rstrip("/"), absolute(folder).rstrip("/")
    return inner == outer or inner.startswith(outer + "/")


class SteadyFile(WrappedFile):
    """A file of a network store. A read that fails is retried at the same position.

    Each read fetches only the requested range. On S3 a read names the etag of the opened object,
    so a replaced object is detected.
    """

    def __init__(self, file: BinaryIO, doing: str, patience_s: float) -> None:
        super().__init__(file)
        self._doing = doing
        self._patience_s = patience_s
        self.details: dict[str, Any] = getattr(file, "details", None) or {}

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()

        def once() -> bytes:
            self._file.seek(start)
            try:
                return self._file.read(size)
            except (OSError, TypeError) as error:  # s3fs: TypeError, if an answer has no message
                if error_code(error) in ("PreconditionFailed", "412"):
                    raise InputError(f"cannot {self._doing}: it was changed meanwhile") from error
                raise

        return persist(self._doing, once, self._patience_s)


def open_file(fs: AbstractFileSystem, path: str, shown: str, patience_s: float) -> BinaryIO:
    """Open a file for reading; on a network store, in ranges."""
    doing = f"read {shown}"
    if not patience_s:
        with storage_errors(doing):
            return cast("BinaryIO", fs.open(path, "rb"))
    file = persist(doing, lambda: fs.open(path, "rb", cache_type="none"), patience_s)
    return cast("BinaryIO", SteadyFile(file, doing, patience_s))


@contextmanager
def _missing_is_a_bucket(doing: str) -> Iterator[None]:
    """Turn FileNotFoundError of a write into StorageFailed: only the bucket can be missing."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageFailed(
            f"cannot {doing}: its bucket or container does not exist; create it, then resume"
        ) from error


def _is_local(fs: AbstractFileSystem) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return "file" in protocols


def to_stat(path: str, info: dict[str, Any]) -> Stat:
    names = ("ETag", "etag", "mtime", "LastModified", "created")
    tag = next((info[name] for name in names if info.get(name)), "")
    return Stat(path, int(info["size"] or 0), str(tag).strip('"'))


def _link_or_copy(temporary: str, path: str, data: bytes) -> None:
    """Give the file its name, if the name is free; write it there if hard links do not work."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _flush_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
