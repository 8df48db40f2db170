"""Lists the subfolders of a store and deletes many objects at once."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Sequence
from functools import partial

from batchgen.storage.store import Store

_AT_ONCE = 1000  # objects that one S3 request can delete


def subfolders(store: Store, folder: str) -> list[str]:
    """List the folders directly in ``folder``; in a bucket these are prefixes up to a slash."""
    path = store.path(folder)
    try:
        entries = store.attempt(f"list {store.url}/{folder}", partial(store.fs.ls, path, True))
    except FileNotFoundError:
        return []
    names = {entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"}
    return sorted(posixpath.basename(name) for name in names - {path.rstrip("/")})


def delete_all(store: Store, names: Sequence[str]) -> None:
    """Delete these objects in this order, then the local folders that are empty."""
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        if store.local or not store.fs.async_impl:
            for name in some:
                store.delete(name)
        else:
            paths = [store.path(name) for name in some]
            store.attempt(f"delete objects of {store.url}", partial(store.fs.rm, paths))
    if store.local:
        parents = {os.path.dirname(name) for name in names}
        outer = {os.path.dirname(parent) for parent in parents}
        for folder in sorted((parents | outer) - {""}, key=len, reverse=True):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(store.path(folder))
