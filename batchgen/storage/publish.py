"""Puts finished local files at their place in a store: by a rename on a disk, else by an upload."""

from __future__ import annotations

import mmap
import os
from functools import partial
from typing import cast

from batchgen.storage.connect import limits
from batchgen.storage.faults import storage_errors
from batchgen.storage.store import Store


def publish(store: Store, path: str, name: str) -> None:
    """Move a local file to ``name`` in the store, where a reader sees all of it or nothing.

    On a local disk the file must be on the same disk as the store. A large file is not read into
    memory: S3 gets it in parts, other stores by their own package.
    """
    doing = f"write {store.url}/{name}"
    if store.local:
        with storage_errors(doing):
            os.makedirs(os.path.dirname(store.path(name)), exist_ok=True)
            os.replace(path, store.path(name))
        return
    with open(path, "rb") as file:
        if os.path.getsize(path) < 2 * limits().part_bytes:
            store.put(name, file.read())
        elif "s3" in store.fs.protocol:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                store.put(name, cast("bytes", mapped))  # its slices are bytes
        else:
            store.attempt(doing, partial(store.fs.put_file, path, store.path(name)))
    os.unlink(path)


def place_of(path: str, url: str) -> str:
    """The URL, or local path, of a file of the filesystem of ``url``, by its path in there."""
    scheme, mark, _ = url.partition("://")
    if not mark or "://" in path or scheme == "file":
        return path
    return f"{scheme}://{path}"
