"""The files of a source: their names, sizes and times, and how to read them."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

from batchgen.errors import InputError
from batchgen.importing.rows import Refused
from batchgen.plan.keys import is_safe, safe_key
from batchgen.spec.tree import canonical_json
from batchgen.storage import Stat, absolute, find_files, open_input
from batchgen.storage.publish import place_of

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_ABOUT = re.compile(r"(^|/)(readme|licen[sc]e|citation)[^/]*$|\.md$", re.IGNORECASE)
_NOT_DATA = ("__MACOSX", "_batchgen")
READ_LIMIT_BYTES = (
    64 << 20
)  # of an image, an XML or a label file; input.uri_limit_bytes is the same
_BLOCK_BYTES = 1 << 20
LISTING_LIMIT_BYTES = 4 << 30  # of a COCO JSON, which is read whole


@dataclass(frozen=True)
class Listing:
    """The files of a source, by their names under its folder, in the order of their names.

    Attributes:
        source: the file, folder, glob or URL as given.
        base: the folder in the filesystem that the names are relative to.
        files: name -> path, size in bytes, and etag or modification time.
    """

    source: str
    base: str
    files: dict[str, Stat] = field(repr=False)

    @property
    def is_local(self) -> bool:
        return "://" not in self.source or self.source.startswith("file://")

    @property
    def root(self) -> str:
        """The folder of the source as an absolute path or URL."""
        return place_of(self.base, self.source)

    @property
    def stem(self) -> str:
        """The name of the source without folder and extension, for keys of its rows."""
        last = self.source.rstrip("/").rpartition("/")[2]
        return last.partition(".")[0] or "row"

    @property
    def is_one_file(self) -> bool:
        """Whether the source is a file, and not a folder or a glob."""
        return len(self.files) == 1 and self.place(next(iter(self.files))).endswith(
            self.source.rstrip("/").rpartition("/")[2]
        )

    @property
    def image_root(self) -> str:
        """The folder that holds the images: the source's, or around ``annotations`` of COCO."""
        outer, _, last = self.root.rpartition("/")
        return outer if self.is_one_file and last == "annotations" else self.root

    def neighbours(self) -> Listing:
        """The files near a source that is one file, which its rows may name."""
        return listed(self.image_root)

    def named(self, *endings: str) -> list[str]:
        """Names that end so, in lower or upper case."""
        return [name for name in self.files if name.lower().endswith(endings)]

    def has_only(self, *endings: str) -> bool:
        """Whether all files end so, except texts about the source, such as README.md."""
        others = self.files.keys() - set(self.named(*endings))
        return len(others) < len(self.files) and all(map(_ABOUT.search, others))

    def place(self, name: str) -> str:
        """The absolute path or URL of a file."""
        return place_of(self.files[name].path, self.source)

    def open(self, name: str) -> BinaryIO:
        """Open a file; a later change of a local file raises InputError."""
        stat = self.files[name]
        return open_input(stat.path, self.source, stat.etag)

    def read(self, name: str, limit: int = READ_LIMIT_BYTES) -> bytes:
        """Read a complete file.

        Raises:
            Refused: ``damaged-file``: it is larger than the limit.
        """
        if self.files[name].size > limit:
            raise Refused(
                "damaged-file",
                f"{name} has {self.files[name].size:,} bytes; allowed: up to {limit:,}",
            )
        with self.open(name) as file:
            return file.read()

    def under(self, folder: str) -> Listing:
        """The same source, with only the files under a folder, named relative to it."""
        start = f"{folder}/" if folder else ""
        files = {
            name[len(start) :]: stat for name, stat in self.files.items() if name.startswith(start)
        }
        return Listing(self.source, posixpath.join(self.base, folder), files)

    def facts(self) -> list[list[str | int]]:
        """Name, size, and etag or time of each file."""
        return [[name, stat.size, stat.etag] for name, stat in self.files.items()]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ``facts``."""
        return hashlib.sha256(canonical_json(self.facts()).encode()).hexdigest()


def listed(source: str) -> Listing:
    """List a file, a folder with its subfolders, or a glob, local or at any fsspec URL.

    Names that begin with a dot, and folders ``__MACOSX`` and ``_batchgen``, are left out.

    Raises:
        InputError: there is nothing, or a link is broken.
    """
    base, stats = find_files(absolute(source) if "://" not in source else source, "", hidden=True)
    files: dict[str, Stat] = {}
    for stat in stats:
        name = posixpath.relpath(stat.path, base) if base else stat.path
        if not any(part.startswith(".") or part in _NOT_DATA for part in name.split("/")):
            files[name] = stat
    if not files:
        raise InputError(f"source {source}: it has no files that can be imported")
    return Listing(source, base, files)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGES)


def stem_of(name: str) -> str:
    """The name of a file without its extension; folders stay."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.rpartition(".")[0] or last)


def file_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for each file: its name without extension, with ``-`` for ``/``.

    Where that is not a safe key, or not unique, the key ends in a hash of the full name. So a key
    depends on the names of the files, and not on their order.
    """
    short = {name: stem_of(name).replace("/", "-") for name in names}
    counts = Counter(one.lower() for one in short.values())
    return {
        name: one
        if counts[one.lower()] == 1 and is_safe(one) and safe_key(one) == one
        else safe_key(name)
        for name, one in short.items()
    }


def row_keys(name: str) -> Callable[[int], str]:
    """The keys of the rows of a file, by their numbers; as ``plan.keys.row_key``."""
    start = safe_key(stem_of(name))
    return lambda row: f"{start}-{row:08d}"


def lines_of(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line, without its end; of a longer one ``limit + 1``.

    The file is read in blocks, since each read of a planned file asks for its time.
    """
    number, rest = 1, b""
    while block := file.read(_BLOCK_BYTES):
        first, *lines = block.split(b"\n")
        rest += first[: limit + 1 - len(rest)]
        for line in lines:
            yield number, rest.removesuffix(b"\r")
            number, rest = number + 1, line[: limit + 1]
    if rest:
        yield number, rest
