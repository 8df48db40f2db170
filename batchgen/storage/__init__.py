"""Object stores and local folders, reached through fsspec, which only this package imports."""

from batchgen.storage.connect import Limits, configure
from batchgen.storage.faults import storage_errors
from batchgen.storage.folders import delete_all, subfolders
from batchgen.storage.inputs import find_files, open_input, read_limited
from batchgen.storage.store import (
    TEMPORARY,
    Stat,
    Store,
    absolute,
    is_within,
    open_store,
)
from batchgen.storage.uploads import Upload, abort, unfinished_uploads
from batchgen.storage.web import Denied
from batchgen.storage.wrapped import WrappedFile

__all__ = [
    "TEMPORARY",
    "Denied",
    "Limits",
    "Stat",
    "Store",
    "Upload",
    "WrappedFile",
    "abort",
    "absolute",
    "configure",
    "delete_all",
    "find_files",
    "is_within",
    "open_input",
    "open_store",
    "read_limited",
    "storage_errors",
    "subfolders",
    "unfinished_uploads",
]
