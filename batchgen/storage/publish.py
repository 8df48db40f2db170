"""Puts finished local files at their place in a store: by a rename on a disk, else by an upload."""

from __future__ import annotations

import os
from functools import partial

from batchgen.storage.faults import storage_errors
from batchgen.storage.store import Store


def publish(store: Store, path: str, name: str) -> None:
    """Move a local file to ``name`` in the store, where a reader sees all of it or nothing.

    On a local disk the file must be on the same disk as the store.
    """
    doing = f"write {store.url}/{name}"
    if store.local:
        with storage_errors(doing):
            os.makedirs(os.path.dirname(store.path(name)), exist_ok=True)
            os.replace(path, store.path(name))
        return
    store.attempt(doing, partial(store.fs.put_file, path, store.path(name)))
    os.unlink(path)


def place_of(path: str, url: str) -> str:
    """The URL, or local path, of a file of the filesystem of ``url``, by its path in there."""
    scheme, mark, _ = url.partition("://")
    if not mark or "://" in path or scheme == "file":
        return path
    return f"{scheme}://{path}"
