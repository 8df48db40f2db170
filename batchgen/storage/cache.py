"""What stands at a URL, brought once to each node that needs it: files of models."""

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

CACHE = "BATCHGEN_CACHE"  # the environment's name of the folder; read when something is fetched
USUAL_CACHE = "~/.cache/batchgen/models"
_THREADS = 8

Choose = Callable[[Sequence[str]], Sequence[str]]


def is_url(place: str) -> bool:
    """It is a URL, and no path, name or hub id."""
    return "://" in place


def fetch(url: str, choose: Choose, cache: Path | None = None) -> Path:
    """The folder of this node that holds a URL's files, or the file if the URL is one's.

    It lies in the cache and is named by a hash of the URL and of the files' names, sizes and etags,
    so that another content has another folder. What is there is not fetched again; of many
    processes that want it one fetches, the others wait. It gets its name when it is whole.

    Args:
        url: any that fsspec knows.
        choose: of the names below the URL those to be fetched; a file's is its last part.
        cache: default: the folder that ``BATCHGEN_CACHE`` names, or ``USUAL_CACHE``.

    Raises:
        InputError: no such protocol, nothing there, or nothing of what was chosen.
        StorageFailed: the store refuses or fails, or the cache cannot be written.
    """
    shown = without_secrets(url)
    try:
        return _fetched(open_store(url), shown, choose, cache or cache_folder())
    except FileNotFoundError:
        raise InputError(f"{shown}: there is nothing") from None
    except RetryShard as error:
        raise StorageFailed(str(error)) from None


def cache_folder() -> Path:
    """Where this machine keeps what was fetched."""
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
    """Name -> what is known, of what is chosen."""
    stats = store.stats()
    if _is_file(store, stats.values()):  # whose own name may have a query
        stats = {posixpath.basename(shown): stat for stat in stats.values()}
    chosen = sorted(choose(list(stats)))
    if not chosen:
        found = ", ".join(sorted(stats)[:3]) or "no file"
        more = ", ..." if len(stats) > 3 else ""
        raise InputError(f"{shown}: nothing that would be loaded; there is {found}{more}")
    return {name: stats[name] for name in chosen}


def _is_file(store: Store, stats: Iterable[Stat]) -> bool:
    """The URL is that of one file."""
    return [stat.path for stat in stats] == [store.root]


def _is_whole(folder: Path, files: Mapping[str, Stat]) -> bool:
    """It is there, and nobody has deleted from it since."""
    return all(_is_like(folder / name, stat) for name, stat in files.items())


def _is_like(file: Path, stat: Stat) -> bool:
    """Some stores know no sizes."""
    return file.is_file() and stat.size in (0, file.stat().st_size)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is; what an interrupted one has left half fetched is removed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise StorageFailed(
            f"the folder for fetched models {folder.parent} cannot be written: {error.strerror};"
            f" name another by {CACHE}"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(f"{folder.name}.part-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _bring(
    store: Store, files: Mapping[str, Stat], folder: Path, is_same: Callable[[], bool]
) -> None:
    """Fetch all files, see that nothing has changed meanwhile, then name the folder."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda one: store.fetch(files[one], str(temporary / one)), files))
        if not _is_whole(temporary, files) or not is_same():
            raise StorageFailed(f"{store.url} changed while it was fetched; start again")
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole any more
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
