"""Finds and opens local input files: follows links, and opens only regular files."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from batchgen.errors import InputError
from batchgen.storage.wrapped import WrappedFile


def walk(folder: str, depth: int | None = None, hidden: bool = False) -> Iterator[str]:
    """Yield everything under a folder: files and folders, through links as well.

    Each folder is searched once, however many links lead to it: by its own name if that is under
    the folder, else by the name of the first link. So circles of links end.

    Args:
        folder: where the search starts.
        depth: levels to search; 1 means only the folder itself.
        hidden: include names that begin with ``_`` or ``.``.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [(folder, 1)], list[tuple[str, int]]()
    while folders or links:
        if not folders:
            links.sort()
            folders.append(links.pop(0))
        place, level = folders.pop()
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(place) as entries:  # closed also if the caller stops early
            for entry in entries:
                if not hidden and entry.name.startswith(("_", ".")):
                    continue
                yield entry.path
                if level != depth and _is_folder(entry):
                    (links if entry.is_symlink() else folders).append((entry.path, level + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if error.errno != errno.ELOOP:
            raise
        return False


def facts_of(path: str) -> os.stat_result:
    """Return the status of a file, or of a link's target.

    Raises:
        InputError: a broken link, or a name that is not UTF-8 and so cannot be stored in the plan.
    """
    try:
        path.encode()
        return os.stat(path)
    except UnicodeEncodeError:
        raise InputError(f"the name of input file {path!a} is not UTF-8; rename it") from None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not os.path.islink(path):
            raise
        raise InputError(
            f"input {path} is a link to {os.readlink(path)}, which does not exist; "
            "restore it, or remove the link"
        ) from error


def time_of(facts: os.stat_result) -> str:
    """Return the modification time, which stands for the etag of a local file."""
    return str(facts.st_mtime)


def open_regular(path: str) -> BinaryIO:
    """Open a local file. Pipes and devices, which may never end, are refused without reading.

    Raises:
        InputError: it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


class PlannedFile(WrappedFile):
    """A local file that must be as it was when planned: its time is checked after each read.

    Raises:
        InputError: on opening or reading, if the file was changed or replaced.
    """

    def __init__(self, path: str, planned: str) -> None:
        super().__init__(open_regular(path))
        self._path = path
        self._planned = planned
        try:
            self._refuse_another()
        except InputError:
            self.close()
            raise

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self._refuse_another()
        return data

    def _refuse_another(self) -> None:
        now = time_of(os.fstat(self._file.fileno()))
        if not _is_same_time(self._planned, now):
            raise InputError(
                f"input file {self._path} has changed: it was written at {_shown(self._planned)} "
                f"when planned, and at {_shown(now)} now; restore it, or write to a new output (on "
                "a cluster each node needs the same file: use a shared folder, or copies that keep "
                "the times, such as `rsync -a` makes)"
            )


def _is_same_time(planned: str, now: str) -> bool:
    """Compare two times; only to the second if one of them has whole seconds, as some disks do."""
    one, other = _seconds(planned), _seconds(now)
    if one is None or other is None:
        return planned == now
    whole = one.is_integer() or other.is_integer()
    return one == other or (whole and math.floor(one) == math.floor(other))


def _seconds(time: str) -> float | None:
    try:
        return float(time)
    except ValueError:
        return None


def _shown(time: str) -> str:
    seconds = _seconds(time)
    return time if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(" ")
