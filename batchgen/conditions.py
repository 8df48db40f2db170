"""Conditioning images: opened from a row's bytes, made from one another, fitted to their size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from batchgen.errors import RejectRow, nearest

Array = np.ndarray[Any, Any]
Resize = Literal["fill", "fit", "stretch", "multiple-of"]

MAX_PIXELS = 64 * 1024 * 1024  # 8192 x 8192; 192 MB once decoded
SIXTEEN_BIT = 65535
WHITE = 128  # from this level on a mask's pixel is repainted
# Raster formats only: Pillow would hand EPS to Ghostscript. (JPEG includes cameras' MPO.)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_image(data: object) -> Image.Image:
    """A conditioning image, upright, as RGB in its own size.

    Of an animation the first frame is taken. The EXIF orientation is applied, transparency is laid
    over white, 16-bit grey is scaled to 8 bit.

    Args:
        data: the file's bytes, or the ``{"bytes", "path"}`` struct of Hugging Face datasets.

    Raises:
        RejectRow: ``null-image``, ``undecodable-image``, ``unsupported-image`` or
            ``image-too-large``.
    """
    return _to_rgb(_open(_file_bytes(data, "image"), "image"), "white", "image")


def open_mask(data: object) -> Image.Image:
    """A mask, upright, as grey levels (mode ``L``) in its own size; white is repainted.

    Read like an image, but colours count by their luminance, and transparency is laid over black:
    what is transparent is kept.

    Args:
        data: as for `open_image`.

    Raises:
        RejectRow: ``null-mask``, ``undecodable-mask``, ``unsupported-mask`` or ``mask-too-large``.
    """
    return _to_rgb(_open(_file_bytes(data, "mask"), "mask"), "black", "mask").convert("L")


def match_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask at the size of the image it belongs to, so that both are cropped alike.

    A mask may be a smaller or larger copy, to within a pixel. One of another shape has no sure
    place on the image.

    Raises:
        RejectRow: ``mask-size``.
    """
    if mask.size == image.size:
        return mask
    pairs = list(zip(mask.size, image.size, strict=True))
    if max((m - 1) / i for m, i in pairs) >= min((m + 1) / i for m, i in pairs):
        raise RejectRow(
            "mask-size",
            f"mask of {mask.width} x {mask.height} pixels for an image of {image.width} x "
            f"{image.height}; allowed: the image's size, or its shape in another size",
        )
    return mask.resize(image.size, Image.Resampling.BOX)


def size_for(image: Image.Image, multiple_of: int, upscale: int = 1) -> tuple[int, int]:
    """(width, height) in pixels of the conditioning image, for the policy ``multiple-of``.

    Args:
        image: in its own size; it is rounded down.
        multiple_of: what width and height of the image *to be made* must be multiples of.
        upscale: pixels of the image to be made a pixel of the conditioning image, each way.

    Raises:
        RejectRow: ``image-too-small``.
    """
    step = multiple_of // math.gcd(multiple_of, upscale)
    width, height = image.width // step * step, image.height // step * step
    if not width or not height:
        raise _too_small(image, step, step, "image")
    return width, height


def fit_image(image: Image.Image, width: int, height: int, policy: Resize) -> Image.Image:
    """The image at width x height pixels, by the Lanczos filter where it is resized.

    Policies:
        fill: scaled to cover the size, then cropped about the centre.
        fit: scaled to lie inside the size, then padded about the centre with black.
        stretch: resized, whatever becomes of its aspect.
        multiple-of: cropped about the centre, never resized; see `size_for`.

    Raises:
        RejectRow: ``image-too-small``, for multiple-of.
    """
    return _fitted(image, (width, height), policy, Image.Resampling.LANCZOS, "image")


def fit_mask(mask: Image.Image, width: int, height: int, policy: Resize) -> Array:
    """The mask of an image that `fit_image` fits by the same policy, as uint8 (height, width).

    255 is repainted, 0 is kept; nothing lies between. A pixel is repainted where the mask has a
    mean of at least 128. The padding of ``fit`` is kept: the row's mask does not ask for
    it, and the bars stay as black as in the conditioning image, to be cut off again. (To paint
    beyond an image, give it the larger canvas and a mask that is white there.)

    Args:
        mask: of the image's size (see `match_mask`), or it will not lie upon the image.

    Raises:
        RejectRow: ``empty-mask`` where nothing is repainted, ``mask-too-small`` for multiple-of.
    """
    fitted = np.asarray(_fitted(mask, (width, height), policy, Image.Resampling.BOX, "mask"))
    if fitted.max() < WHITE:
        raise RejectRow(
            "empty-mask",
            f"mask is white nowhere: its brightest level at {width} x {height} pixels is "
            f"{fitted.max()}, before that {mask.getextrema()[1]}; allowed: {WHITE} or more "
            "somewhere",
        )
    return np.where(fitted >= WHITE, np.uint8(255), np.uint8(0))  # (height, width)


def to_array(image: Image.Image) -> Array:
    """An RGB image as uint8 (height, width, 3), C-contiguous, writable and of its own memory."""
    return np.array(image, dtype=np.uint8)


def _fitted(
    image: Image.Image,
    size: tuple[int, int],
    policy: Resize,
    resampling: Image.Resampling,
    what: str,
) -> Image.Image:
    if policy == "fill":
        return ImageOps.fit(image, size, method=resampling)
    if policy == "stretch":
        return image.resize(size, resampling)
    if policy == "fit":
        scale = min(size[0] / image.width, size[1] / image.height)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        padded = Image.new(image.mode, size)  # black
        padded.paste(image.resize(inner, resampling), _middle(size, inner))
        return padded
    if image.width < size[0] or image.height < size[1]:
        raise _too_small(image, *size, what)
    left, top = _middle(image.size, size)
    return image.crop((left, top, left + size[0], top + size[1]))


def _middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """Left and top at which the inner lies in the middle of the outer."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def _too_small(image: Image.Image, width: int, height: int, what: str) -> RejectRow:
    return RejectRow(
        f"{what}-too-small",
        f"{what} of {image.width} x {image.height} pixels; allowed: at least {width} x {height}",
    )


def _file_bytes(data: object, what: str) -> bytes:
    if isinstance(data, Mapping):
        path, data = data.get("path"), data.get("bytes")
        if data is None and path:
            raise RejectRow(
                f"null-{what}", f"{what} has the path {path!r} but no bytes; allowed: image bytes"
            )
    if data is None:
        raise RejectRow(f"null-{what}", f"{what} is null; allowed: image bytes")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise RejectRow(
            f"undecodable-{what}", f"{what} is of type {type(data).__name__}; allowed: image bytes"
        )
    if len(data) == 0:
        raise RejectRow(f"null-{what}", f"{what} has zero bytes; allowed: a whole image file")
    return bytes(data)


def _open(data: bytes, what: str) -> Image.Image:
    """The first frame, decoded and upright; its size is checked before it is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_readable())
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image.load()
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectRow(f"{what}-too-large", f"{error}; allowed: {MAX_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(error, what) from error
    raise RejectRow(
        f"{what}-too-large",
        f"{what} of {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} pixels",
    )


@cache
def _readable() -> tuple[str, ...]:
    """``FORMATS`` as far as this build of Pillow has them; it fails on a name it does not know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _undecodable(error: Exception, what: str) -> RejectRow:
    known = ", ".join(_readable())
    reason = re.sub(r" <_io\.BytesIO [^>]*>", "", str(error))  # an address: new in every run
    return RejectRow(
        f"undecodable-{what}",
        f"{what} cannot be decoded ({type(error).__name__}: {reason}); "
        f"allowed: a whole {known} file",
    )


def _to_rgb(image: Image.Image, ground: str, what: str) -> Image.Image:
    """The image as RGB, its transparency laid over a ground of the named colour."""
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image, what)
    if image.mode == "F":
        raise RejectRow(
            f"unsupported-{what}", f"{what} of floats; allowed: 1, 8 or 16 bit a channel"
        )
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        over = image.convert("RGBA")
    except ValueError as error:
        raise RejectRow(
            f"unsupported-{what}",
            f"{what} of mode {image.mode}; allowed: grey, palette, RGB, YCbCr, CMYK, with alpha",
        ) from error
    return Image.alpha_composite(Image.new("RGBA", over.size, ground), over).convert("RGB")


def _sixteen_bit_grey(image: Image.Image, what: str) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)  # (H, W)
    if levels.min() < 0 or levels.max() > SIXTEEN_BIT:
        raise RejectRow(
            f"unsupported-{what}",
            f"grey levels {levels.min()} to {levels.max()}; allowed: 0 to {SIXTEEN_BIT}",
        )
    scaled = (levels + 128) // 257  # 65535 / 257 = 255, to the nearest
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Option:
    """A number that a maker takes: its default and its bounds. A whole default asks for whole."""

    default: float
    low: float
    high: float

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.default, int) else "number"
        return f"a {kind} from {self.low} to {self.high}"

    def read(self, value: object) -> float:
        """The value as the default's type. Raises ValueError where it is not allowed."""
        kind = type(self.default)
        number = value if isinstance(value, int | float) else math.nan
        if isinstance(value, bool) or not self.low <= number <= self.high or kind(number) != number:
            raise ValueError(f"got {value!r}; allowed: {self}")
        return kind(number)


@dataclass(frozen=True)
class Maker:
    """A classical way to a conditioning image: ``make`` takes an RGB image and the options."""

    name: str
    about: str
    make: Callable[..., Image.Image]
    options: Mapping[str, Option] = field(default_factory=dict)


def make_condition(name: str, options: Mapping[str, float], image: Image.Image) -> Image.Image:
    """The RGB image that a maker makes of an RGB image; equal pixels give equal pixels.

    It has the image's size, but for ``downscale``, which is for before an image is fitted.

    Raises:
        ValueError: as `check_maker`.
    """
    settings = _settings(name, options)
    return MAKERS[name].make(image, **settings)


def check_maker(name: str, options: Mapping[str, float]) -> None:
    """Raises ValueError for a name, an option or a value that is not known; says what is."""
    _settings(name, options)


def describe(name: str, options: Mapping[str, float]) -> str:
    """The maker with all its options, as is recorded with a sample: ``canny(high=200, low=100)``.

    Raises:
        ValueError: as `check_maker`.
    """
    settings = sorted(_settings(name, options).items())
    return f"{name}({', '.join(f'{option}={value}' for option, value in settings)})"


def _settings(name: str, options: Mapping[str, float]) -> dict[str, float]:
    """Every option of a maker, as given or by default."""
    if name not in MAKERS:
        raise ValueError(f"got {name!r}; allowed: {', '.join(MAKERS)}{nearest(name, MAKERS)}")
    known = MAKERS[name].options
    for option in options:
        if option not in known:
            allowed = ", ".join(known) or "no options"
            raise ValueError(f"{name}: got {option!r}; allowed: {allowed}{nearest(option, known)}")
    settings = {}
    for option, bounds in known.items():
        try:
            settings[option] = bounds.read(options.get(option, bounds.default))
        except ValueError as error:
            raise ValueError(f"{name}.{option}: {error}") from None
    if settings.get("low", 0) > settings.get("high", math.inf):  # OpenCV would swap them
        raise ValueError(
            f"{name}.low: got {settings['low']}; allowed: up to high, {settings['high']}"
        )
    return settings


def _canny(image: Image.Image, low: int, high: int) -> Image.Image:
    import cv2  # 0.2 s at first, for its users alone

    edges = cv2.Canny(np.asarray(image), low, high)  # (H, W) uint8, 0 or 255
    return Image.fromarray(edges).convert("RGB")


def _scribble(image: Image.Image, level: int) -> Image.Image:
    fine, coarse = (
        np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(np.int16)  # (H, W, 3)
        for radius in (0.5, 5.0)
    )
    lines = 2 * (coarse - fine).min(axis=2) > level  # darker than around it, in every channel
    return Image.fromarray(np.where(lines, np.uint8(255), np.uint8(0))).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _downscale(image: Image.Image, factor: int) -> Image.Image:
    width, height = (max(1, round(side / factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _tile(image: Image.Image, factor: int) -> Image.Image:
    return _downscale(image, factor).resize(image.size, Image.Resampling.BICUBIC)


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


_EDGE = 1020  # the 3 x 3 Sobel gradient of a step from black to white
_MAKERS = (
    Maker(
        "canny",
        "edges by Canny's detector, white on black",
        _canny,
        {"low": Option(100, 0, _EDGE), "high": Option(200, 0, _EDGE)},
    ),
    Maker(
        "scribble",
        "dark lines by a difference of Gaussians, white on black",
        _scribble,
        {"level": Option(32, 1, 255)},
    ),
    Maker("invert", "the negative, for drawings in dark lines on light", ImageOps.invert),
    Maker("grey", "luminance alone, to be coloured", _grey),
    Maker("tile", "shrunk and enlarged, its detail lost", _tile, {"factor": Option(8, 2, 64)}),
    Maker("downscale", "shrunk, to be enlarged", _downscale, {"factor": Option(4, 2, 64)}),
    Maker("blur", "blurred by a Gaussian", _blur, {"radius": Option(4.0, 0.1, 64.0)}),
)
MAKERS: Mapping[str, Maker] = MappingProxyType({maker.name: maker for maker in _MAKERS})
