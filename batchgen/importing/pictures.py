"""Reads and checks the images of a source: each is decoded once, so a damaged one is refused."""

from __future__ import annotations

import io
import posixpath
import re
import threading
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from batchgen.images.source import IMAGE_FORMATS
from batchgen.importing.listing import READ_LIMIT_BYTES, Listing
from batchgen.importing.rows import ImageMode, Refused, refuse

Size = tuple[int, int]

MAX_PIXELS = 128 << 20  # the most that input.image_limit_pixels allows
_LARGE_PIXELS = 16 << 20  # images with more are decoded one at a time
_LARGE = threading.Lock()
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap the sides
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Picture:
    """An image of a row.

    Attributes:
        value: the struct ``{"bytes", "path"}`` of the column.
        size: width and height in pixels, as one sees it; None if its file was not read.
        stored: the same as the file stores it, before the EXIF orientation.
    """

    value: dict[str, Any]
    size: Size | None
    stored: Size | None = None


@dataclass(frozen=True)
class Pictures:
    """The images of a source: where their files are, and whether they are copied into the rows."""

    listing: Listing
    mode: ImageMode
    root: Listing | None = None

    def prepared(self) -> Pictures:
        """With the files next to a source that is one file, since its rows may name them."""
        if self.root is not None or not self.listing.is_one_file:
            return self
        return replace(self, root=self.listing.neighbours())

    def find(self, name: str, folders: tuple[str, ...] = ("",)) -> tuple[Listing, str] | None:
        """The file that a row names, searched in these folders; None if there is none.

        Raises:
            Refused: the name leads out of the source.
        """
        for listing in filter(None, (self.root, self.listing)):
            inner = _inside(name, listing)
            if inner is None:
                continue
            for folder in folders:
                found = posixpath.normpath(posixpath.join(folder, inner))
                if found in listing.files:
                    return listing, found
        return None

    def named(self, name: str, what: str = "image", folders: tuple[str, ...] = ("",)) -> Picture:
        """The image that a row names.

        Raises:
            Refused: the file is missing, outside of the source, empty or damaged.
        """
        found = self.find(name, folders)
        if found is not None:
            return self.load(found[1], what, listing=found[0])
        if _URL.match(name):  # of another server: the run fetches it
            return Picture({"bytes": None, "path": name}, None)
        places = [one for one in (self.root, self.listing) if one is not None]
        if all(_inside(name, one) is None for one in places):
            refuse(
                f"forbidden-{what}",
                f"{what} {name!r} is outside of {', '.join(one.root for one in places)}",
                "files in the folder of the source, or in that of --image-root",
            )
        refuse(
            f"missing-{what}",
            f"{what} {name!r} is not in {', '.join(one.root for one in places)}",
            "files that exist; --image-root names another folder",
        )

    def load(
        self, name: str, what: str = "image", measure: bool = False, listing: Listing | None = None
    ) -> Picture:
        """The image of a file of the source.

        Args:
            name: the file's name in ``listing``, by default in that of the source.
            what: the column, for messages.
            measure: the size is needed, so the file is read even by reference.
        """
        listing = listing or self.listing
        stat = listing.files[name]
        if stat.size == 0:
            refuse(f"null-{what}", f"{what} {name} has zero bytes", "complete image files")
        if stat.size > READ_LIMIT_BYTES:
            limit = f"up to {READ_LIMIT_BYTES:,} bytes"
            refuse(f"{what}-too-large", f"{what} {name} has {stat.size:,} bytes", limit)
        if self.mode == "bytes":
            return checked(listing.read(name), name, what)
        value = {"bytes": None, "path": listing.place(name)}
        if not measure and not listing.is_local:
            return Picture(value, None)
        with listing.open(name) as file:
            image = _opened(file, name, what)
            return Picture(value, upright(image), image.size)


def checked(data: bytes, name: str, what: str = "image") -> Picture:
    """The image of these bytes, after it was decoded.

    Raises:
        Refused: it is empty, no image, damaged or too large.
    """
    if not data:
        refuse(f"null-{what}", f"{what} {name} has zero bytes", "complete image files")
    image = _opened(io.BytesIO(data), name, what)
    size, stored = upright(image), image.size
    if image.width * image.height > _LARGE_PIXELS:
        with _LARGE:
            _decode(image, name, what)
    else:
        _decode(image, name, what)
    return Picture({"bytes": data, "path": name}, size, stored)


def check_mask(mask: Picture, size: Size | None, where: str) -> None:
    """Check that a label mask, as it is stored, has the size of its image as one sees it.

    Raises:
        Refused: ``bad-label_mask``.
    """
    if mask.stored != size:
        given = "x".join(map(str, mask.stored or ()))
        wanted = "x".join(map(str, size or ()))
        refuse(
            "bad-label_mask", f"{where}: a label mask of {given} pixels", f"{wanted}, as its image"
        )


def _opened(file: Any, name: str, what: str) -> Image.Image:
    """Read an image's head."""
    try:
        Image.init()
        formats = [one for one in IMAGE_FORMATS if one in Image.OPEN]
        image: Image.Image = Image.open(file, formats=formats)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise _undecodable(error, name, what) from error
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{what} {name} has {image.width} x {image.height} pixels"
        refuse(f"{what}-too-large", pixels, f"up to {MAX_PIXELS:,} pixels")
    return image


def _decode(image: Image.Image, name: str, what: str) -> None:
    """Decode all of a file; a JPEG in an eighth of its size, which reads all of it as well."""
    try:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error, name, what) from error


def _undecodable(error: Exception, name: str, what: str) -> Refused:
    reason = re.sub(r" <[^>]*>", "", str(error))  # an address: new in every run
    return Refused(
        f"undecodable-{what}",
        f"{what} {name} cannot be decoded ({type(error).__name__}: {reason}); allowed: a complete "
        f"file in one of the formats {', '.join(IMAGE_FORMATS)}",
    )


def upright(image: Image.Image) -> Size:
    """Width and height as one sees the image, with its EXIF orientation."""
    try:
        turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # damaged EXIF: Pillow ignores the orientation as well
        turned = False
    return (image.height, image.width) if turned else image.size


def _inside(name: str, listing: Listing) -> str | None:
    """The name relative to the listing's folder; None if it is outside."""
    if _URL.match(name) or name.startswith("/"):
        root = listing.root.rstrip("/") + "/"
        if not name.startswith(root):
            return None
        name = name[len(root) :]
    inner = posixpath.normpath(name.replace("\\", "/"))
    return None if inner.startswith(("../", "/")) or inner == ".." else inner
