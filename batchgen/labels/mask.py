"""Label masks: images whose pixels are class numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from batchgen.errors import RejectRow
from batchgen.images.geometry import Array, Size, scaling
from batchgen.images.source import open_labels
from batchgen.labels.move import Move


@dataclass(frozen=True)
class LabelMask:
    """A label mask: uint8 or uint16 (height, width), and the palette that shows it, if it has one.

    ``palette``: 768 bytes of RGB for 256 classes.
    """

    classes: Array
    palette: bytes | None = None

    @property
    def size(self) -> Size:
        return self.classes.shape[1], self.classes.shape[0]

    def png(self) -> bytes:
        """The mask as a PNG file; equal masks give equal bytes."""
        image = Image.fromarray(self.classes)
        if self.palette is not None:
            image.putpalette(self.palette)  # the mode becomes P, and the pixels stay
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def moved(self, move: Move, ignored: int) -> LabelMask:
        """The mask after a move of its image; padding gets the class ``ignored``."""
        return replace(self, classes=move.mask(self.classes, ignored))

    def without(self, area: Array, ignored: int) -> LabelMask:
        """The mask with the class ``ignored`` in ``area``: bool (height, width)."""
        return replace(self, classes=np.where(area, self.classes.dtype.type(ignored), self.classes))


def read_mask(data: object, limit_pixels: int, size: Size | None) -> LabelMask:
    """Read a label mask, as large as its image; one of the same aspect ratio is enlarged to it.

    Args:
        data: bytes of an image file with one channel: grey of 8 or 16 bits, palette or 1 bit.
        limit_pixels: larger masks are rejected, not decoded.
        size: (width, height) of its image; None if there is none.

    Raises:
        RejectRow: ``bad-label_mask``, or as `images.source.open_labels`.
    """
    image = open_labels(data, limit_pixels)
    depth = _png_grey_depth(data)
    palette = image.getpalette("RGB") if image.mode == "P" else None
    if image.mode == "1":
        image = image.convert("L").point(lambda level: level // 255)
    classes = np.asarray(image)
    if depth in (2, 4):  # Pillow spreads such levels over 0 to 255
        classes = classes // np.uint8(255 // (2**depth - 1))
    if classes.dtype == np.int32:  # Pillow's mode I; how it opens some 16-bit PNGs
        if classes.min() < 0 or classes.max() > 65535:
            raise RejectRow("bad-label_mask", "the label mask has classes outside of 0 to 65535")
        classes = classes.astype(np.uint16)
    padded = None if palette is None else bytes(palette).ljust(768, b"\0")
    mask = LabelMask(np.ascontiguousarray(classes), padded)
    if size is None or mask.size == size:
        return mask
    pairs = list(zip(mask.size, size, strict=True))
    if max((m - 1) / i for m, i in pairs) >= min((m + 1) / i for m, i in pairs):
        raise RejectRow(
            "bad-label_mask",
            f"the label mask has {mask.size[0]} x {mask.size[1]} pixels and its image {size[0]} x "
            f"{size[1]}; they need the same size, or the same aspect ratio",
        )
    return mask.moved(Move(scaling(mask.size, size), mask.size, size), 0)


def _png_grey_depth(data: object) -> int:
    """The bits of a pixel of a grey PNG; 0 for any other file. Format: PNG, chunk IHDR."""
    held = data.get("bytes") if isinstance(data, Mapping) else data
    head = bytes(held[:26]) if isinstance(held, bytes | bytearray | memoryview) else b""
    is_grey = head[:4] == b"\x89PNG" and len(head) == 26 and head[25] == 0
    return head[24] if is_grey else 0
