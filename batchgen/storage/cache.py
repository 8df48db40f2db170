"""Node-local download cache for model files that are given by URL."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from batchgen.errors import InputError, RetryShard, StorageFailed
from batchgen.secrets import without_secrets
from batchgen.storage import Stat, Store, open_store

CACHE = "BATCHGEN_CACHE"  # environment variable with the folder; read at each fetch
USUAL_CACHE = "~/.cache/batchgen/models"
_THREADS = 8

Choose = Callable[[Sequence[str]], Sequence[str]]


def is_url(place: str) -> bool:
    """Whether it is a URL, not a path, name or hub id."""
    return "://" in place


def fetch(url: str, choose: Choose, cache: Path | None = None) -> Path:
    """Return the local folder with a URL's files, or the local file if the URL names one file.

    The folder is in the cache and is named by a hash of the URL and of the files' names, sizes and
    etags, so that other content gets another folder. Files that are in the cache are not fetched
    again. If several processes need them, one fetches and the others wait. The folder gets its name
    when it is complete.

    Args:
        url: any URL that fsspec supports.
        choose: selects the names to fetch from those under the URL; a file's name is its last part.
        cache: default: the folder that ``BATCHGEN_CACHE`` names, or ``USUAL_CACHE``.

    Raises:
        InputError: unknown protocol, no file there, or none of the chosen files.
        StorageFailed: the store refuses or fails, or the cache cannot be written.
    """
    shown = without_secrets(url)
    try:
        return _fetched(open_store(url), shown, choose, cache or cache_folder())
    except FileNotFoundError:
        raise InputError(f"{shown}: there is no file or folder") from None
    except RetryShard as error:
        raise StorageFailed(str(error)) from None


def cache_folder() -> Path:
    """Return the folder of this machine's download cache."""
    return Path(os.environ.get(CACHE) or USUAL_CACHE).expanduser().absolute()


def _fetched(store: Store, shown: str, choose: Choose, cache: Path) -> Path:
    files = _listed(store, shown, choose)
    facts = [shown, *([name, stat.size, stat.etag] for name, stat in files.items())]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    last = posixpath.basename(shown.rstrip("/"))
    folder = cache / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', last)[:80]}-{digest[:24]}"
    if not _is_whole(folder, files):
        with _alone(folder):
            if not _is_whole(folder, files):
                _bring(store, files, folder, lambda: _listed(store, shown, choose) == files)
    return folder / last if _is_file(store, files.values()) else folder


def _listed(store: Store, shown: str, choose: Choose) -> dict[str, Stat]:
    """Map the names of the chosen files to size and etag."""
    stats = store.stats()
    if _is_file(store, stats.values()):  # the store's name of it may include a query
        stats = {posixpath.basename(shown): stat for stat in stats.values()}
    chosen = sorted(choose(list(stats)))
    if not chosen:
        found = ", ".join(sorted(stats)[:3]) or "no file"
        more = ", ..." if len(stats) > 3 else ""
        raise InputError(f"{shown}: no model file to load; found: {found}{more}")
    return {name: stats[name] for name in chosen}


def _is_file(store: Store, stats: Iterable[Stat]) -> bool:
    """Whether the URL names one file."""
    return [stat.path for stat in stats] == [store.root]


def _is_whole(folder: Path, files: Mapping[str, Stat]) -> bool:
    """Whether all files are there; somebody may have deleted some of them."""
    return all(_is_like(folder / name, stat) for name, stat in files.items())


def _is_like(file: Path, stat: Stat) -> bool:
    """Whether the file is there with the right size. Some stores know no sizes."""
    return file.is_file() and stat.size in (0, file.stat().st_size)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes; remove partial downloads of interrupted ones."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise StorageFailed(
            f"the download cache {folder.parent} cannot be written: {error.strerror}; "
            f"set {CACHE} to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(f"{folder.name}.part-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _bring(
    store: Store, files: Mapping[str, Stat], folder: Path, is_same: Callable[[], bool]
) -> None:
    """Fetch all files, check that nothing changed meanwhile, then give the folder its name."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda one: store.fetch(files[one], str(temporary / one)), files))
        if not _is_whole(temporary, files) or not is_same():
            raise StorageFailed(f"{store.url} changed during the download; start the job again")
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
