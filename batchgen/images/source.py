"""Opens the images of rows: upright, as RGB, within limits of pixels and memory."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from batchgen.errors import RejectRow

Array = np.ndarray[Any, Any]

MAX_PIXELS = 64 << 20  # 8192 x 8192; 201 MB once decoded
LARGE_PIXELS = 16 << 20  # only one row at a time may hold images with more pixels
STRIP_PIXELS = 4 << 20  # number of pixels converted at a time
SIXTEEN_BIT = 65535
# Raster formats only: Pillow would run Ghostscript for EPS. (JPEG includes cameras' MPO.)
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_LARGE = threading.Lock()


class Turn:
    """Context of one row's images. Only one row at a time may hold large images.

    An actor prepares as many rows at once as it has threads, and a large image takes hundreds of
    megabytes. This keeps the memory near that of one row.
    """

    def __init__(self) -> None:
        self._holds = False

    def before(self, pixels: int) -> None:
        """Before a large image is decoded: wait until no other row holds a large image."""
        if pixels > LARGE_PIXELS and not self._holds:
            _LARGE.acquire()
            self._holds = True

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._holds:
            self._holds = False
            _LARGE.release()


def open_image(
    data: object,
    limit_pixels: int = MAX_PIXELS,
    before: Callable[[int], None] = lambda pixels: None,
) -> Image.Image:
    """Open a conditioning image, upright, as RGB in its own size.

    The first frame of an animation is used. The EXIF orientation is applied, transparency becomes
    white, 16-bit grey is scaled to 8 bit.

    Args:
        data: the file's bytes, or the ``{"bytes", "path"}`` struct of Hugging Face datasets.
        limit_pixels: images with more pixels are rejected, not decoded.
        before: called with the number of pixels before the image is decoded.

    Raises:
        RejectRow: ``null-image``, ``undecodable-image``, ``unsupported-image`` or
            ``image-too-large``.
    """
    image = _open(_file_bytes(data, "image"), "image", limit_pixels, before)
    return _to_rgb(image, "white", "image")


def open_mask(
    data: object,
    limit_pixels: int = MAX_PIXELS,
    before: Callable[[int], None] = lambda pixels: None,
) -> Image.Image:
    """Open a mask, upright, as grey levels (mode ``L``) in its own size; white is repainted.

    Masks are read like images, but colours become their luminance, and transparency becomes black,
    so transparent areas are kept.

    Args:
        data, limit_pixels, before: as for `open_image`.

    Raises:
        RejectRow: ``null-mask``, ``undecodable-mask``, ``unsupported-mask`` or ``mask-too-large``.
    """
    mask = _open(_file_bytes(data, "mask"), "mask", limit_pixels, before)
    return _to_rgb(mask, "black", "mask").convert("L")


def open_labels(data: object, limit_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a label mask as it is stored: its pixels are class numbers, and no orientation applies.

    Returns:
        An image of mode ``1``, ``L``, ``P``, ``I`` or ``I;16``.

    Raises:
        RejectRow: ``null-label_mask``, ``undecodable-label_mask``, ``unsupported-label_mask`` or
            ``label_mask-too-large``.
    """
    what = "label_mask"
    image = _open(_file_bytes(data, what), what, limit_pixels, lambda pixels: None, upright=False)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise RejectRow(
            f"unsupported-{what}",
            f"{what} has the mode {image.mode}; allowed: one channel of class numbers (grey of 8 "
            "or 16 bits, palette, 1 bit)",
        )
    return image


def _file_bytes(data: object, what: str) -> bytes:
    if isinstance(data, Mapping):
        path, data = data.get("path"), data.get("bytes")
        if data is None and path:
            raise RejectRow(
                f"null-{what}", f"{what} has the path {path!r} but no bytes; needed: image bytes"
            )
    if data is None:
        raise RejectRow(f"null-{what}", f"{what} is null; needed: image bytes")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise RejectRow(
            f"undecodable-{what}", f"{what} has type {type(data).__name__}; needed: image bytes"
        )
    if len(data) == 0:
        raise RejectRow(f"null-{what}", f"{what} has zero bytes; needed: a complete image file")
    return bytes(data)


def _open(
    data: bytes, what: str, limit: int, before: Callable[[int], None], upright: bool = True
) -> Image.Image:
    """Decode the first frame, upright if asked; its size is checked before."""
    try:
        image = Image.open(io.BytesIO(data), formats=_readable())
        pixels = image.width * image.height
        if pixels <= limit:
            before(pixels)
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectRow(f"{what}-too-large", f"{error}; allowed: up to {limit} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(error, what) from error
    raise RejectRow(
        f"{what}-too-large",
        f"{what} has {image.width} x {image.height} pixels; allowed: up to {limit} pixels "
        "(input.image_limit_pixels)",
    )


@cache
def _readable() -> tuple[str, ...]:
    """Return those of ``FORMATS`` that this build of Pillow has; it fails on unknown names."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _undecodable(error: Exception, what: str) -> RejectRow:
    known = ", ".join(_readable())
    reason = re.sub(r" <_io\.BytesIO [^>]*>", "", str(error))  # an address: new in every run
    return RejectRow(
        f"undecodable-{what}",
        f"{what} cannot be decoded ({type(error).__name__}: {reason}); "
        f"allowed: a complete file in one of the formats {known}",
    )


def _to_rgb(image: Image.Image, ground: str, what: str) -> Image.Image:
    """Convert an image to RGB; transparency shows a background of the named colour."""
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image, what)
    if image.mode == "F":
        raise RejectRow(
            f"unsupported-{what}",
            f"{what} has floating-point pixels; allowed: 1, 8 or 16 bits a channel",
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    try:
        return _in_strips(image, lambda strip: _flat(strip, ground))
    except ValueError as error:
        raise RejectRow(
            f"unsupported-{what}",
            f"{what} has the mode {image.mode}; allowed: grey, palette, RGB, YCbCr, CMYK, each "
            "also with alpha",
        ) from error


def _flat(image: Image.Image, ground: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, ground), over).convert("RGB")


def _in_strips(image: Image.Image, make: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image strip by strip, so that there is no second large copy in memory."""
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return make(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        whole.paste(make(image.crop((0, top, image.width, bottom))), (0, top))
    return whole


def _sixteen_bit_grey(image: Image.Image, what: str) -> Image.Image:
    levels = np.asarray(image)
    lowest, highest = int(levels.min()), int(levels.max())
    del levels
    if lowest < 0 or highest > SIXTEEN_BIT:
        raise RejectRow(
            f"unsupported-{what}",
            f"{what} has grey levels from {lowest} to {highest}; allowed: 0 to {SIXTEEN_BIT}",
        )
    return _in_strips(image, _eight_bit)


def _eight_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.uint32)  # (H, W)
    scaled = (levels + 128) // 257  # 65535 / 257 = 255, to the nearest
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
