"""Files that are read: those of a dataset, and objects that its rows name by URI."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast
from urllib.parse import urljoin

from batchgen.errors import InputError
from batchgen.storage.connect import filesystem, is_networked, limits
from batchgen.storage.faults import persist, storage_errors
from batchgen.storage.local import PlannedFile, facts_of, open_regular, time_of, walk
from batchgen.storage.store import Stat, open_file, to_stat

_GLOB = re.compile(r"[*?\[]")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)
MOST_REDIRECTS = 5


def find_files(path: str, suffix: str = ".parquet") -> tuple[str, list[Stat]]:
    """The files of a dataset, sorted by path, and the folder that their names are relative to.

    ``path`` is one file, a folder (searched deeply for ``suffix``, in small or capital letters;
    names that begin with ``_`` or ``.`` are left out) or a glob. On a disk, links to files and
    folders are followed; a file has the link's path, and the size and time of what it names.

    Raises:
        InputError: nothing is there, or a link leads nowhere.
    """
    fs, root = filesystem(path)
    doing = f"read {path}"
    if "file" in fs.protocol:
        with storage_errors(doing):
            base, files = _look_on_disk(root, path, suffix)
    else:

        def look() -> tuple[str, list[Stat]]:
            fs.invalidate_cache()
            return _look(fs, root, path, suffix)

        if is_networked(path):
            base, files = persist(doing, look, limits().patience_s)
        else:
            with storage_errors(doing):
                base, files = look()
    if not files:
        raise InputError(f"input {path}: no {suffix} file there")
    return base, sorted(files, key=lambda stat: stat.path)


def open_input(path: str, url: str, etag: str = "") -> BinaryIO:
    """Open a file that ``find_files`` found, on the filesystem of the URL it was asked with.

    Raises:
        InputError: it is not the one that had this etag any more, now or at a later read.
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
            "put it back, or write to a new output"
        )
    return file


def _look_on_disk(root: str, path: str, suffix: str) -> tuple[str, list[Stat]]:
    base, found = _named_on_disk(root, path, suffix)
    files = []
    for name in found:
        facts = facts_of(name)
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"input {name} is no regular file; remove it, or name others")
        files.append(Stat(name, facts.st_size, time_of(facts)))
    return base, files


def _named_on_disk(root: str, path: str, suffix: str) -> tuple[str, Iterator[str]]:
    """The folder that names are relative to, and what the path names: folders may be among it."""
    pattern = _GLOB.search(root)
    if pattern and not os.path.lexists(root):
        return posixpath.dirname(root[: pattern.start()]), _matching(root, pattern.start(), suffix)
    if not os.path.lexists(root):
        raise InputError(f"input {path}: no such file or folder")
    if not os.path.isdir(root):
        return posixpath.dirname(root), iter([root])
    base = root.rstrip("/")
    return base, (
        name for name in walk(root) if _is_data(name, base, suffix) or _leads_nowhere(name)
    )


def _matching(pattern: str, magic: int, suffix: str) -> Iterator[str]:
    """What a glob matches; of a folder that is named like a file, as Spark writes, what is in it.

    Args:
        magic: where in the pattern the first wildcard stands.
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


def _look(fs: Any, root: str, path: str, suffix: str) -> tuple[str, list[Stat]]:
    """The folder that names are relative to, and the files of a store."""
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
        found = _below(fs, base, suffix)
    return base, [to_stat(name, info) for name, info in found.items() if info["type"] == "file"]


def _below(fs: Any, folder: str, suffix: str) -> dict[str, Any]:
    found = fs.find(folder, detail=True)
    return {name: info for name, info in found.items() if _is_data(name, folder, suffix)}


def _is_data(name: str, base: str, suffix: str) -> bool:
    parts = posixpath.relpath(name, base).split("/")
    return name.lower().endswith(suffix) and not any(part.startswith(("_", ".")) for part in parts)


def read_limited(url: str, limit_bytes: int, follow: Callable[[str], object]) -> bytes:
    """The object, or its first ``limit_bytes + 1`` bytes if it is larger.

    Args:
        follow: called with every address that a web server sends on to; raises where that must not
            be read from.

    Raises:
        FileNotFoundError: there is none.
        InputError: a web server refuses.
        StorageFailed: the store refuses, or its faults did not pass.
    """
    from fsspec.asyn import sync

    fs, path = filesystem(url)

    def call() -> bytes:
        if "http" in fs.protocol:
            got: bytes = sync(fs.loop, _get, fs, path, limit_bytes + 1, follow)
            return got
        size = fs.info(path)["size"]
        end = None if size is not None and size <= limit_bytes else limit_bytes + 1
        data: bytes = fs.cat_file(path, end=end) if end else fs.cat_file(path)
        return data

    if is_networked(url):
        return persist(f"read {url.partition('?')[0]}", call, limits().patience_s)
    with storage_errors(f"read {url}"):
        return call()


async def _get(fs: Any, url: str, most: int, follow: Callable[[str], object]) -> bytes:
    """Up to ``most`` bytes from a web server, of which no more are read."""
    session = await fs.set_session()
    for _ in range(MOST_REDIRECTS + 1):
        async with session.get(fs.encode_url(url), allow_redirects=False, **fs.kwargs) as answer:
            if "Location" in answer.headers and answer.status in _REDIRECTS:
                url = urljoin(url, answer.headers["Location"])
                follow(url)
                continue
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            if 400 <= answer.status < 500 and answer.status not in _MAY_PASS:
                raise InputError(f"the server answers {answer.status} {answer.reason}")
            answer.raise_for_status()
            data = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) >= most:
                    break
            return bytes(data[:most])
    raise InputError(f"the server sends on more than {MOST_REDIRECTS} times")
