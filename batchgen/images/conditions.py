"""Conditioning images: resizes them, matches masks to images, and makes them (edges, blur, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from batchgen.errors import RejectRow, nearest

Array = np.ndarray[Any, Any]
Resize = Literal["fill", "fit", "stretch", "multiple-of"]

WHITE = 128  # a mask's pixel of this level or above is repainted


def match_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Resize the mask to the size of its image, so that both are cropped in the same way.

    The mask may have another size if it has the same aspect ratio, to within a pixel. For a mask of
    another aspect ratio it is not known where it belongs on the image.

    Raises:
        RejectRow: ``mask-size``.
    """
    if mask.size == image.size:
        return mask
    pairs = list(zip(mask.size, image.size, strict=True))
    if max((m - 1) / i for m, i in pairs) >= min((m + 1) / i for m, i in pairs):
        raise RejectRow(
            "mask-size",
            f"the mask has {mask.width} x {mask.height} pixels and the image {image.width} x "
            f"{image.height}; they need the same size, or the same aspect ratio",
        )
    return mask.resize(image.size, Image.Resampling.BOX)


def size_for(image: Image.Image, multiple_of: int, upscale: int = 1) -> tuple[int, int]:
    """Compute (width, height) in pixels of the conditioning image, for the policy ``multiple-of``.

    Args:
        image: in its own size, which is rounded down.
        multiple_of: width and height of the *generated* image must be multiples of this.
        upscale: size of the generated image divided by that of the conditioning image.

    Raises:
        RejectRow: ``image-too-small``.
    """
    step = multiple_of // math.gcd(multiple_of, upscale)
    width, height = image.width // step * step, image.height // step * step
    if not width or not height:
        raise _too_small(image, step, step, "image")
    return width, height


def fit_image(image: Image.Image, width: int, height: int, policy: Resize) -> Image.Image:
    """Bring the image to width x height pixels; resizing uses the Lanczos filter.

    Policies:
        fill: scale it to cover the size, then crop about the centre.
        fit: scale it to fit inside the size, then pad with black about the centre.
        stretch: resize it and ignore the aspect ratio.
        multiple-of: crop it about the centre, never resize it; see `size_for`.

    Raises:
        RejectRow: ``image-too-small``, for multiple-of.
    """
    return _fitted(image, (width, height), policy, Image.Resampling.LANCZOS, "image")


def fit_mask(mask: Image.Image, width: int, height: int, policy: Resize) -> Array:
    """Bring a mask to width x height pixels as `fit_image` does; returns uint8 (height, width).

    The values are 255 (repainted) and 0 (kept). A pixel is repainted where the mask has a mean of
    at least 128. The padding of ``fit`` is kept: the row's mask does not include it, and the bars
    stay as black as in the conditioning image, so that they can be cropped. (To paint beyond an
    image, give it the larger canvas and a mask that is white there.)

    Args:
        mask: of the image's size (see `match_mask`), so that it matches the fitted image.

    Raises:
        RejectRow: ``empty-mask`` if no pixel is repainted, ``mask-too-small`` for multiple-of.
    """
    fitted = np.asarray(_fitted(mask, (width, height), policy, Image.Resampling.BOX, "mask"))
    if fitted.max() < WHITE:
        raise RejectRow(
            "empty-mask",
            f"the mask selects nothing: after resizing to {width} x {height} its brightest pixel "
            f"is {fitted.max()} ({WHITE} needed); before resizing it was {mask.getextrema()[1]}",
        )
    return np.where(fitted >= WHITE, np.uint8(255), np.uint8(0))  # (height, width)


def grow_mask(mask: Array, pixels: int) -> Array:
    """Grow a bool mask (height, width) by this many pixels in all directions."""
    import cv2  # the import takes 0.2 s, so only its users pay for it

    side = 2 * pixels + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    grown: Array = cv2.dilate(mask.astype(np.uint8), disc).astype(bool)
    return grown


def to_array(image: Image.Image) -> Array:
    """Copy an RGB image into a writable, C-contiguous uint8 array (height, width, 3)."""
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
        inner = fitted_size(image.size, size)
        padded = Image.new(image.mode, size)  # black
        padded.paste(image.resize(inner, resampling), middle(size, inner))
        return padded
    if image.width < size[0] or image.height < size[1]:
        raise _too_small(image, *size, what)
    left, top = middle(image.size, size)
    return image.crop((left, top, left + size[0], top + size[1]))


def fitted_size(size: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Return the size that the policy ``fit`` gives an image, before it is padded."""
    scale = min(outer[0] / size[0], outer[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """Return the left and top at which the inner size is centred in the outer."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def _too_small(image: Image.Image, width: int, height: int, what: str) -> RejectRow:
    return RejectRow(
        f"{what}-too-small",
        f"the {what} has {image.width} x {image.height} pixels; needed: at least {width} x "
        f"{height}",
    )


@dataclass(frozen=True)
class Option:
    """A numeric option of a maker: default and bounds. An int default allows only integers."""

    default: float
    low: float
    high: float

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.default, int) else "number"
        return f"a {kind} from {self.low} to {self.high}"

    def read(self, value: object) -> float:
        """Convert a value to the default's type; ValueError if it is not allowed."""
        kind = type(self.default)
        number = value if isinstance(value, int | float) else math.nan
        if isinstance(value, bool) or not self.low <= number <= self.high or kind(number) != number:
            raise ValueError(f"got {value!r}; allowed: {self}")
        return kind(number)


@dataclass(frozen=True)
class Maker:
    """A classical method that makes a conditioning image; ``make`` takes RGB image and options."""

    name: str
    about: str
    make: Callable[..., Image.Image]
    options: Mapping[str, Option] = field(default_factory=dict)


def make_condition(name: str, options: Mapping[str, float], image: Image.Image) -> Image.Image:
    """Apply a maker to an RGB image; the result is RGB, and equal pixels give equal pixels.

    It has the image's size, except for ``downscale``, which runs before the image is resized.

    Raises:
        ValueError: as `settings_of`.
    """
    settings = settings_of(name, options, MAKERS)
    return MAKERS[name].make(image, **settings)


def describe(name: str, options: Mapping[str, float], makers: Makers) -> str:
    """Format a maker with all its options, as outputs record it: ``canny(high=200, low=100)``.

    Raises:
        ValueError: as `settings_of`.
    """
    settings = sorted(settings_of(name, options, makers).items())
    return f"{name}({', '.join(f'{option}={value}' for option, value in settings)})"


class Optioned(Protocol):
    """Something with options by name."""

    @property
    def options(self) -> Mapping[str, Option]:
        """Name -> default and bounds."""


Makers = Mapping[str, Optioned]


def settings_of(name: str, options: Mapping[str, float], makers: Makers) -> dict[str, float]:
    """Return every option of a maker, as given or by default.

    Raises:
        ValueError: an unknown name or option, or a wrong value; the message says what is allowed.
    """
    if name not in makers:
        raise ValueError(f"got {name!r}; allowed: {', '.join(makers)}{nearest(name, makers)}")
    known = makers[name].options
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
    if settings.get("low", 0) > settings.get("high", math.inf):  # OpenCV would silently swap them
        raise ValueError(
            f"{name}.low: got {settings['low']}; allowed: at most high ({settings['high']})"
        )
    return settings


def _canny(image: Image.Image, low: int, high: int) -> Image.Image:
    import cv2  # the import takes 0.2 s, so only its users pay for it

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
        "edges found by Canny's detector, white on black",
        _canny,
        {"low": Option(100, 0, _EDGE), "high": Option(200, 0, _EDGE)},
    ),
    Maker(
        "scribble",
        "dark lines found by a difference of Gaussians, white on black",
        _scribble,
        {"level": Option(32, 1, 255)},
    ),
    Maker("invert", "the negative, for drawings with dark lines on white", ImageOps.invert),
    Maker("grey", "the image without colours, to be coloured", _grey),
    Maker(
        "tile",
        "the image shrunk and enlarged again, without its details",
        _tile,
        {"factor": Option(8, 2, 64)},
    ),
    Maker(
        "downscale",
        "the image shrunk, for super-resolution",
        _downscale,
        {"factor": Option(4, 2, 64)},
    ),
    Maker("blur", "the image blurred by a Gaussian", _blur, {"radius": Option(4.0, 0.1, 64.0)}),
)
MAKERS: Mapping[str, Maker] = MappingProxyType({maker.name: maker for maker in _MAKERS})
