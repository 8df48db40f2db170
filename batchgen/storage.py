"""Object stores and folders behind a handful of verbs; the only home of fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from batchgen.errors import InputError, RetryShard, StorageFailed

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TEMPORARY = "_batchgen/tmp"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "azure"}
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Stat:
    """One object: its full path in the filesystem, size in bytes, and etag or mtime as text."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Store:
    """A folder on some filesystem. Every name is relative to it, with forward slashes.

    Writes are whole objects: a reader sees the old object, the new one, or none, never a part.
    """

    fs: AbstractFileSystem
    root: str
    url: str
    local: bool

    def path(self, name: str) -> str:
        return posixpath.join(self.root, name) if name else self.root

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        with storage_errors(f"read {self.url}/{name}"):
            data: bytes = self.fs.cat_file(self.path(name))
            return data

    def open(self, name: str) -> BinaryIO:
        with storage_errors(f"open {self.url}/{name}"):
            file: BinaryIO = self.fs.open(self.path(name), "rb")
            return file

    def put(self, name: str, data: bytes) -> None:
        """Write or replace one object atomically; on a local disk it is flushed as well."""
        with storage_errors(f"write {self.url}/{name}"):
            if not self.local:
                self.fs.pipe_file(self.path(name), data)
                return
            with self._temporary(name, data) as temporary:
                os.replace(temporary, self.path(name))
            _flush_folder(os.path.dirname(self.path(name)))

    def put_new(self, name: str, data: bytes) -> bool:
        """Write one object only if there is none of that name; False when there is.

        An object with the same content counts as ours: a lost reply to an earlier try looks so.
        """
        with storage_errors(f"create {self.url}/{name}"):
            if not self.local:
                return self._put_new_remote(name, data)
            with self._temporary(name, data) as temporary:
                try:
                    _link_or_copy(temporary, self.path(name), data)
                except FileExistsError:
                    return self.read(name) == data
            _flush_folder(os.path.dirname(self.path(name)))
            return True

    def delete(self, name: str) -> None:
        """Remove one object; none being there is fine."""
        with storage_errors(f"delete {self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def find(self, folder: str) -> dict[str, int]:
        """Name below ``folder`` -> size in bytes, of the files in it and its subfolders."""
        with storage_errors(f"list {self.url}/{folder}"):
            self.fs.invalidate_cache(self.path(folder))
            found = self.fs.find(self.path(folder), detail=True)
            return {
                posixpath.relpath(name, self.path(folder)): int(info["size"])
                for name, info in found.items()
            }

    def stats(self) -> dict[str, Stat]:
        """Name -> what is known of every file, or of the one file that the place is.

        Raises FileNotFoundError when there is nothing.
        """
        with storage_errors(f"list {self.url}"):
            self.fs.invalidate_cache(self.root)
            info = self.fs.info(self.root)
            if info["type"] == "file":
                return {posixpath.basename(self.root): _stat(self.root, info)}
            return {
                posixpath.relpath(name, self.root): _stat(name, info)
                for name, info in self.fs.find(self.root, detail=True).items()
                if info["type"] == "file"
            }

    def fetch(self, stat: Stat, path: str) -> None:
        """Copy one object to a file of this machine."""
        with storage_errors(f"fetch {stat.path} of {self.url}"):
            self.fs.get_file(stat.path, path)

    def list(self, folder: str) -> dict[str, int]:
        """File name -> size in bytes of the files directly in ``folder``; empty if none."""
        with storage_errors(f"list {self.url}/{folder}"):
            self.fs.invalidate_cache(self.path(folder))
            try:
                entries = self.fs.ls(self.path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return {
                posixpath.basename(entry["name"]): int(entry["size"])
                for entry in entries
                if entry["type"] == "file"
            }

    def clear_temporary(self, older_than_s: float) -> None:
        """Remove what a killed run left half written (local disks only; stores never show it)."""
        if not self.local:
            return
        for name in self.list(TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                age_s = time.time() - os.stat(self.path(f"{TEMPORARY}/{name}")).st_mtime
                if age_s > older_than_s:
                    self.delete(f"{TEMPORARY}/{name}")

    @contextmanager
    def _temporary(self, name: str, data: bytes) -> Iterator[str]:
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
            self.fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return self.read(name) == data
        except OSError as error:
            if not _precondition_failed(error):
                raise
            return self.read(name) == data
        return True


def open_store(url: str) -> Store:
    """The store at ``url``: a local folder or any fsspec URL. Nothing is created yet."""
    fs, root = _filesystem(url)
    root = root.rstrip("/") or "/"
    local = _is_local(fs)
    return Store(fs, root, root if local else url.rstrip("/"), local)


def absolute(url: str) -> str:
    """The same place by a name that holds in any working directory."""
    fs, root = _filesystem(url)
    return root if _is_local(fs) else url


def is_within(url: str, folder: str) -> bool:
    """``url`` is ``folder`` or lies below it."""
    inner, outer = absolute(url).rstrip("/"), absolute(folder).rstrip("/")
    return inner == outer or inner.startswith(outer + "/")


def find_files(path: str, suffix: str = ".parquet") -> tuple[str, list[Stat]]:
    """The files of a dataset, sorted by path, and the folder that their names are relative to.

    ``path`` is one file, a folder (searched deeply for ``suffix``; names that begin with ``_`` or
    ``.`` are left out) or a glob.

    Raises:
        InputError: nothing is there.
    """
    fs, root = _filesystem(path)
    with storage_errors(f"read {path}"):
        pattern = _GLOB.search(root)
        if pattern and not fs.exists(root):
            found = fs.glob(root, detail=True)
            base = posixpath.dirname(root[: pattern.start()])
        elif not fs.exists(root):
            raise InputError(f"input {path}: no such file or folder")
        elif fs.isdir(root):
            base = root.rstrip("/")
            found = fs.find(root, detail=True)
            found = {name: info for name, info in found.items() if _is_data(name, base, suffix)}
        else:
            base = posixpath.dirname(root)
            found = {root: fs.info(root)}
    files = [_stat(name, info) for name, info in found.items() if info["type"] == "file"]
    if not files:
        raise InputError(f"input {path}: no {suffix} file there")
    return base, sorted(files, key=lambda stat: stat.path)


def open_input(path: str, url: str) -> BinaryIO:
    """Open a file that ``find_files`` found, on the filesystem of the URL it was asked with."""
    fs, _ = _filesystem(url)
    with storage_errors(f"open {path}"):
        file: BinaryIO = fs.open(path, "rb")
        return file


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Sort a store's exceptions: FileNotFoundError passes, refusals stop, the rest is retried."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, InputError, RetryShard, StorageFailed):
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"cannot {doing}: {error.strerror}: {error.filename}") from error
    except PermissionError as error:
        raise StorageFailed(
            f"cannot {doing}: permission denied; check the credentials and rights ({error})"
        ) from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageFailed(
                f"cannot {doing}: {os.strerror(error.errno or 0)}; free some space, then resume"
            ) from error
        raise RetryShard(f"cannot {doing}: {type(error).__name__}: {error}") from error
    except Exception as error:  # clients of object stores raise classes of their own
        library = type(error).__module__.partition(".")[0]
        if library not in _CLIENT_LIBRARIES:
            raise
        if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
            raise StorageFailed(f"cannot {doing}: {error}; check the credentials") from error
        raise RetryShard(f"cannot {doing}: {type(error).__name__}: {error}") from error


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {error}") from error
    return fs, str(root)


def _is_local(fs: AbstractFileSystem) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return "file" in protocols


def _is_data(name: str, base: str, suffix: str) -> bool:
    parts = posixpath.relpath(name, base).split("/")
    return name.endswith(suffix) and not any(part.startswith(("_", ".")) for part in parts)


def _stat(path: str, info: dict[str, Any]) -> Stat:
    names = ("ETag", "etag", "mtime", "LastModified", "created")
    tag = next((info[name] for name in names if info.get(name)), "")
    return Stat(path, int(info["size"] or 0), str(tag).strip('"'))


def _precondition_failed(error: BaseException) -> bool:
    cause = error.__cause__
    response = getattr(cause, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _link_or_copy(temporary: str, path: str, data: bytes) -> None:
    """Give the file its name, if that is free; by writing it there where there are no links."""
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
