"""Files of a local disk that are read: links are followed, and only regular files are opened."""

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
    """Everything below a folder: files and folders, through links as well.

    Each folder is searched once, however many links lead to it: by its own name where that lies
    below, else by the first link's. So no circle of links goes on for ever.

    Args:
        folder: is searched itself.
        depth: levels to search; 1 stands for the folder alone.
        hidden: also what has a name that begins with ``_`` or ``.``.
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
        with os.scandir(place) as entries:  # a caller may stop at any of them
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
    """What is known of a file, or of what a link to it names.

    Raises:
        InputError: a link that names nothing, or a name that no other program could be told.
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
            f"input {path} is a link to {os.readlink(path)}, which is not there; "
            "put that back, or remove the link"
        ) from error


def time_of(facts: os.stat_result) -> str:
    """What tells a file from one that has taken its place: when it was last written."""
    return str(facts.st_mtime)


def open_regular(path: str) -> BinaryIO:
    """Open a file of a disk. A pipe or a device, that might never end, is refused at once.

    Raises:
        InputError: it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path} is no regular file")
    return os.fdopen(handle, "rb")


class PlannedFile(WrappedFile):
    """A local file, as it was when it was planned: each read is followed by a look at its time.

    Raises:
        InputError: on opening or reading, when it was written to, or another has taken its place.
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
                f"input file {self._path} has changed: planned as written at "
                f"{_shown(self._planned)}, now at {_shown(now)}; put it back, or write to a new "
                "output (on a cluster each node needs the same file: a shared folder, or copies "
                "that keep their times, as `rsync -a` makes them)"
            )


def _is_same_time(planned: str, now: str) -> bool:
    """Equal, or equal to the second where one of the two disks keeps whole seconds."""
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
