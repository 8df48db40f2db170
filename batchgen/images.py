"""Image files in and out: conditioning images become arrays, pixels become PNG, JPEG or WebP."""

from __future__ import annotations

import io
import struct
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from isal import isal_zlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from batchgen.errors import RejectRow

Array = np.ndarray[Any, Any]
ImageFormat = Literal["png", "jpeg", "webp"]

MAX_PIXELS = 64 * 1024 * 1024  # 8192 x 8192; 192 MB once decoded
SIXTEEN_BIT = 65535
# Raster formats only: Pillow would hand EPS to Ghostscript. (JPEG includes cameras' MPO.)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def decode_condition(data: object, width: int, height: int) -> Array:
    """A conditioning image as uint8 RGB (height, width, 3).

    Of an animation the first frame is taken. The EXIF orientation is applied, transparency is laid
    over white, 16-bit grey is scaled to 8 bit. An image of another shape is cropped about its
    centre to the wanted aspect, then resized with the Lanczos filter.

    Args:
        data: the file's bytes, or the ``{"bytes", "path"}`` struct of Hugging Face datasets.
        width: wanted width in pixels.
        height: wanted height in pixels.

    Raises:
        RejectRow: ``null-image``, ``undecodable-image``, ``unsupported-image`` or
            ``image-too-large``.
    """
    image = _open(_file_bytes(data))
    try:
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(error) from error
    fitted = ImageOps.fit(_to_rgb(upright), (width, height), method=Image.Resampling.LANCZOS)
    return np.array(fitted, dtype=np.uint8)  # (height, width, 3)


def encode_image(pixels: Array, image_format: ImageFormat, quality: int) -> bytes:
    """One image as the bytes of a file; equal pixels give equal bytes. Safe for many threads.

    Args:
        pixels: uint8 RGB (height, width, 3).
        image_format: ``png`` (lossless), ``jpeg`` (4:4:4) or ``webp`` (lossy).
        quality: 1 to 100, for JPEG and WebP.

    Raises:
        ValueError: pixels of another shape or dtype, or an unknown format.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}")
    if image_format == "png":
        return _png(pixels)
    options: dict[str, int]
    if image_format == "jpeg":
        options = {"quality": quality, "subsampling": 0}
    elif image_format == "webp":
        options = {"quality": quality, "method": 4}
    else:
        raise ValueError(f"image_format: got {image_format!r}; allowed: png, jpeg, webp")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def _png(pixels: Array) -> bytes:
    """A standard PNG, some twenty times faster than Pillow's: one filter for all rows, ISA-L.

    Format: PNG specification, sections 5 (chunks) and 9 (filter type 2, "up").
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]  # the row above the first counts as zeros
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bit, RGB
    data = isal_zlib.compress(filtered, level=1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (_chunk(b"IHDR", header), _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def _file_bytes(data: object) -> bytes:
    if isinstance(data, Mapping):
        path, data = data.get("path"), data.get("bytes")
        if data is None and path:
            raise RejectRow(
                "null-image", f"image has the path {path!r} but no bytes; allowed: image bytes"
            )
    if data is None:
        raise RejectRow("null-image", "image is null; allowed: image bytes")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise RejectRow(
            "undecodable-image", f"image is of type {type(data).__name__}; allowed: image bytes"
        )
    if len(data) == 0:
        raise RejectRow("null-image", "image has zero bytes; allowed: a whole image file")
    return bytes(data)


def _open(data: bytes) -> Image.Image:
    """The opened and wholly decoded first frame; its size is checked before it is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_readable())
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectRow("image-too-large", f"{error}; allowed: {MAX_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(error) from error
    raise RejectRow(
        "image-too-large",
        f"image of {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} pixels",
    )


@cache
def _readable() -> tuple[str, ...]:
    """``FORMATS`` as far as this build of Pillow has them; it fails on a name it does not know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _undecodable(error: Exception) -> RejectRow:
    known = ", ".join(_readable())
    return RejectRow(
        "undecodable-image",
        f"image cannot be decoded ({type(error).__name__}: {error}); allowed: a whole {known} file",
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image)
    if image.mode == "F":
        raise RejectRow("unsupported-image", "image of floats; allowed: 1, 8 or 16 bit a channel")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        over = image.convert("RGBA")
    except ValueError as error:
        raise RejectRow(
            "unsupported-image",
            f"image of mode {image.mode}; allowed: grey, palette, RGB, YCbCr, CMYK, with alpha",
        ) from error
    white = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(white, over).convert("RGB")


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)  # (H, W)
    if levels.min() < 0 or levels.max() > SIXTEEN_BIT:
        raise RejectRow(
            "unsupported-image",
            f"grey levels {levels.min()} to {levels.max()}; allowed: 0 to {SIXTEEN_BIT}",
        )
    scaled = (levels + 128) // 257  # 65535 / 257 = 255, to the nearest
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def thumbnail(data: bytes, size: int) -> bytes:
    """An image file as a PNG of at most ``size`` pixels a side; small images stay as they are."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    small.save(sink, "PNG")
    return sink.getvalue()


def contact_sheet(images: Sequence[bytes], captions: Sequence[str], columns: int = 8) -> bytes:
    """One PNG that shows image files in a grid, each with its caption below."""
    cell, text_height, gap = 128, 30, 8
    rows = -(-len(images) // columns)
    size = (gap + columns * (cell + gap), gap + rows * (cell + text_height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for place, (data, caption) in enumerate(zip(images, captions, strict=True)):
        left = gap + place % columns * (cell + gap)
        top = gap + place // columns * (cell + text_height + gap)
        with Image.open(io.BytesIO(data)) as image:
            enlarged = ImageOps.contain(
                image.convert("RGB"), (cell, cell), Image.Resampling.BICUBIC
            )
        sheet.paste(enlarged, (left, top))
        draw.multiline_text((left, top + cell + 2), _wrapped(caption), "black", font, spacing=1)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _wrapped(caption: str) -> str:
    lines = textwrap.wrap(caption, 23)
    return "\n".join([lines[0], textwrap.shorten(" ".join(lines[1:]), 23)] if lines[1:] else lines)
