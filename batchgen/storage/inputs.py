"""Finds and opens the files of a dataset, and reads objects that its rows name by URI."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from batchgen.errors import BatchgenError, InputError
from batchgen.storage.connect import filesystem, is_networked, limits
from batchgen.storage.faults import error_code, persist, storage_errors
from batchgen.storage.local import PlannedFile, facts_of, open_regular, time_of, walk
from batchgen.storage.store import Stat, open_file, to_stat
from batchgen.storage.web import Denied, get

_GLOB = re.compile(r"[*?\[]")
# Retries end after this fraction of an object's time, so that the message can name the cause (the
# host is unreachable) and not only the timeout.
_SHARE_OF_PATIENCE = 0.75
# S3 codes that concern one object; all others concern the store, and stop the job.
_DENIED = ("403", "AccessDenied", "Forbidden", "InvalidObjectState")
_UNFIT = (
    *("KeyTooLongError", "InvalidURI", "InvalidArgument", "InvalidBucketName"),
    *("MethodNotAllowed", "InvalidRequest"),
)
_OF_THE_DISK = {
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EBUSY),
}


def find_files(path: str, suffix: str = ".parquet", hidden: bool = False) -> tuple[str, list[Stat]]:
    """Find the files of a dataset, sorted by path, and the folder that their names are relative to.

    ``path`` is one file, a folder (searched with its subfolders for ``suffix`` in lower or upper
    case; names that begin with ``_`` or ``.`` are skipped unless ``hidden``) or a glob. On a local
    disk, links to files and folders are followed; such a file has the path of the link, and the
    size and time of its target.

    Raises:
        InputError: there are no files, or a link is broken.
    """
    try:
        base, files = _found(path, suffix, hidden)
    except ValueError as error:  # a pattern or an address that the filesystem cannot parse
        raise InputError(f"input {path}: {error}") from error
    if not files:
        raise InputError(f"input {path}: it has no {suffix or 'visible'} file")
    return base, sorted(files, key=lambda stat: stat.path)


def _found(path: str, suffix: str, hidden: bool) -> tuple[str, list[Stat]]:
    fs, root = filesystem(path)
    doing = f"read {path}"
    if "file" in fs.protocol:
        with storage_errors(doing):
            return _look_on_disk(root, path, suffix, hidden)

    def look() -> tuple[str, list[Stat]]:
        fs.invalidate_cache()
        return _look(fs, root, path, suffix, hidden)

    if is_networked(path):
        return persist(doing, look, limits().patience_s)
    with storage_errors(doing):
        return look()


def open_input(path: str, url: str, etag: str = "") -> BinaryIO:
    """Open a file that ``find_files`` found, on the filesystem of the URL passed to it.

    Raises:
        InputError: the file no longer has this etag, now or at a later read.
    """
    fs, _ = filesystem(url)
    if "file" in fs.protocol:
        with storage_errors(f"read {path}"):
            return cast("BinaryIO", PlannedFile(path, etag)) if etag else open_regular(path)
    patience_s = limits().patience_s if is_networked(url) else 0.0
    file = open_file(fs, path, path, patience_s)
    now = to_stat(path, getattr(file, "details", None) or {"size": 0}).etag if etag else ""
    if now and now != etag:
        file.close()
        raise InputError(
            f"input file {path} has changed: planned with etag {etag}, now it is {now}; "
            "restore it, or write to a new output"
        )
    return file


def _look_on_disk(root: str, path: str, suffix: str, hidden: bool) -> tuple[str, list[Stat]]:
    base, found = _named_on_disk(root, path, suffix, hidden)
    files = []
    for name in found:
        facts = facts_of(name)
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(
                f"input {name} is not a regular file; remove it, or choose another input path"
            )
        files.append(Stat(name, facts.st_size, time_of(facts)))
    return base, files


def _named_on_disk(root: str, path: str, suffix: str, hidden: bool) -> tuple[str, Iterator[str]]:
    """Find the folder that names are relative to, and all files and folders that match the path."""
    pattern = _GLOB.search(root)
    if pattern and not os.path.lexists(root):
        return posixpath.dirname(root[: pattern.start()]), _matching(root, pattern.start(), suffix)
    if not os.path.lexists(root):
        raise InputError(f"input {path}: no such file or folder")
    if not os.path.isdir(root):
        return posixpath.dirname(root), iter([root])
    base = root.rstrip("/")
    return base, (
        name
        for name in walk(root, hidden=hidden)
        if _is_data(name, base, suffix, hidden) or _leads_nowhere(name)
    )


def _matching(pattern: str, magic: int, suffix: str) -> Iterator[str]:
    """Yield the matches of a glob; for a folder named like a file (as Spark writes), its files.

    Args:
        magic: position of the first wildcard in the pattern.
    """
    from fsspec.utils import glob_translate

    folder, _, rest = pattern[:magic].rpartition("/")
    rest += pattern[magic:]
    fits = re.compile(glob_translate(pattern))
    if not os.path.isdir(folder or "/"):
        return
    for name in walk(folder or "/", None if "**" in rest else rest.count("/") + 1, hidden=True):
        if fits.match(name):
            yield name
            if name.lower().endswith(suffix) and os.path.isdir(name) and "**" not in rest:
                yield from (one for one in walk(name) if _is_data(one, name, suffix))


def _leads_nowhere(name: str) -> bool:
    return os.path.islink(name) and not os.path.exists(name)


def _look(fs: Any, root: str, path: str, suffix: str, hidden: bool) -> tuple[str, list[Stat]]:
    """Find the folder that names are relative to, and the files, in a store."""
    pattern = _GLOB.search(root)
    if pattern and not fs.exists(root):
        base = posixpath.dirname(root[: pattern.start()])
        found = fs.glob(root, detail=True)
        for name, info in list(found.items()):
            if info["type"] == "directory" and name.lower().endswith(suffix):
                found |= _below(fs, name, suffix)
    elif not fs.exists(root):
        raise InputError(f"input {path}: no such file or folder")
    elif not fs.isdir(root):
        base, found = posixpath.dirname(root), {root: fs.info(root)}
    else:
        base = root.rstrip("/")
        found = _below(fs, base, suffix, hidden)
    return base, [to_stat(name, info) for name, info in found.items() if info["type"] == "file"]


def _below(fs: Any, folder: str, suffix: str, hidden: bool = False) -> dict[str, Any]:
    found = fs.find(folder, detail=True)
    return {name: info for name, info in found.items() if _is_data(name, folder, suffix, hidden)}


def _is_data(name: str, base: str, suffix: str, hidden: bool = False) -> bool:
    parts = posixpath.relpath(name, base).split("/")
    seen = hidden or not any(part.startswith(("_", ".")) for part in parts)
    return seen and name.lower().endswith(suffix)


def read_limited(
    url: str, limit_bytes: int, follow: Callable[[str], object], within_s: float
) -> bytes:
    """Read an object, or its first ``limit_bytes + 1`` bytes if it is larger.

    Args:
        follow: called with the target of every redirect; raises if the target is not allowed.
        within_s: time limit for stores on a network.

    Raises:
        FileNotFoundError: there is no such object.
        TimeoutError: it was not read in time.
        Denied: access to this object is denied.
        InputError: this object cannot be read for another reason.
        StorageFailed: the store refuses every request, or its faults did not pass.
        RetryShard: a fault of a disk that may pass.
    """
    fs, path = filesystem(url)
    most = limit_bytes + 1
    if not is_networked(url):
        with storage_errors(f"read {url}"):
            return _from_disk(path, most) if "file" in fs.protocol else _whole(fs, path, most)
    deadline = time.monotonic() + within_s

    def call() -> bytes:
        left_s = deadline - time.monotonic()
        try:
            return _over_network(fs, path, most, follow, left_s) if left_s > 0 else _too_late()
        except BatchgenError:
            raise
        except Exception as error:  # client libraries have their own classes
            if error_code(error) == "InvalidRange":  # S3's answer for an empty object
                return b""
            found = _objects_own(error)
            if found is None:
                raise
            raise found from error

    try:
        patience_s = min(limits().patience_s, _SHARE_OF_PATIENCE * within_s)
        return persist(f"read {url.partition('?')[0]}", call, patience_s)
    except _TooLate:
        raise TimeoutError(f"it was not read within {within_s:g} s") from None


class _TooLate(InputError):
    """The time is over. An InputError, so that ``persist`` does not retry."""


def _too_late() -> bytes:
    raise _TooLate("too late")


def _over_network(
    fs: Any, path: str, most: int, follow: Callable[[str], object], within_s: float
) -> bytes:
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    if not fs.async_impl:
        return _whole(fs, path, most)
    try:
        if "http" in fs.protocol:
            got: bytes = sync(fs.loop, get, fs, path, most, follow, timeout=within_s)
        elif "s3" in fs.protocol:  # only a GET: the answer to a HEAD gives no reason for a refusal
            got = sync(fs.loop, fs._cat_file, path, start=0, end=most, timeout=within_s)
        else:
            info = sync(fs.loop, fs._info, path, timeout=within_s)
            end = most if (info["size"] or most) >= most else None
            got = sync(fs.loop, fs._cat_file, path, end=end, timeout=within_s)
    except FSTimeoutError as error:
        raise _TooLate("too late") from error
    return got


def _whole(fs: Any, path: str, most: int) -> bytes:
    size = fs.info(path)["size"]
    data: bytes = fs.cat_file(path, end=most) if size is None or size >= most else fs.cat_file(path)
    return data


def _objects_own(error: Exception) -> Exception | None:
    """Return the error if it concerns this one object; None if it concerns its store.

    Stores use different codes for wrong credentials and for an object that is denied.
    """
    code, said = error_code(error), str(error).partition("\n")[0]
    if code == "NoSuchBucket":
        return FileNotFoundError(said)
    if code in _DENIED or (not code and said.startswith("Forbidden: ")):  # gcsfs
        return Denied("the store denies access")
    name = type(error).__name__
    if code in _UNFIT or isinstance(error, ValueError) or name == "ParamValidationError":
        return InputError(f"{code or name}: {said}")
    return None


def _from_disk(path: str, most: int) -> bytes:
    """Read a local file. Faults of the disk may pass; all others belong to this path or file."""
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:  # files of /proc have size 0, and may not end
                raise InputError("the file is empty")
            return file.read(most)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise Denied("the user of this process has no permission to read it") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        raise InputError(error.strerror or type(error).__name__) from error
