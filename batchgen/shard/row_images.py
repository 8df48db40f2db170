"""Opens the conditioning images of a row and brings them to the size of its call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import RejectRow
from batchgen.images.conditions import (
    fit_image,
    fit_mask,
    make_condition,
    match_mask,
    to_array,
)
from batchgen.images.geometry import Size, orientation_of
from batchgen.images.source import Turn, open_image, open_mask
from batchgen.plan.columns import python_values
from batchgen.plan.plan import Plan
from batchgen.records import Call
from batchgen.spec.spec import Spec

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]
Fetched = Mapping[str, bytes | RejectRow]
SHRINKING = "downscale"  # the only maker that changes the size, so it runs before fitting


def image_values(column: pa.ChunkedArray) -> list[Any]:
    """For each Hugging Face image struct its bytes, or its path (a URI) if it has no bytes."""
    names = [field.name for field in column.type]
    given = [pc.struct_field(column, name) for name in ("bytes", "path") if name in names]
    found = python_values(given[0])
    if len(given) == 1:
        return found
    paths = python_values(given[1])
    return [one if one is not None else path for one, path in zip(found, paths, strict=True)]


@dataclass(frozen=True)
class Opened:
    """The images of a row, upright; ``source`` describes the one that labels lie on.

    Attributes:
        images: part -> image, shrunk if ``conditioning.make`` asks for ``downscale``.
        size: (width, height) of the source before it was shrunk; None if the row has no image.
        orientation: its EXIF orientation, 1 to 8; asked only for ``labels.orientation: stored``.
    """

    images: Mapping[str, Image.Image]
    size: Size | None = None
    orientation: int = 1


def file_of(values: Mapping[str, Any], part: str, fetched: Fetched) -> Any:
    """The bytes of a row's image, or a value that `images.source` refuses.

    Raises:
        RejectRow: they could not be fetched from their URI.
    """
    data = values[part] or None  # an empty string or struct counts as null
    if isinstance(data, str):
        data = fetched[data]
        if isinstance(data, RejectRow):
            raise data
    return data


def open_images(
    values: Mapping[str, Any], parts: Sequence[str], spec: Spec, fetched: Fetched, turn: Turn
) -> Opened:
    """Open the row's images; the first one, which is the source if there is one, has the labels."""
    images: dict[str, Image.Image] = {}
    size, orientation = None, 1
    for part in parts:
        data = file_of(values, part, fetched)
        opens = open_mask if part == "mask" else open_image
        image = opens(data, spec.input.image_limit_pixels, turn.before)
        if size is None and part != "mask":
            size = image.size
            if spec.labels.orientation == "stored":
                orientation = orientation_of(data)
        made = spec.conditioning.make.get(part)
        if made is not None and made.name == SHRINKING:
            image = make_condition(SHRINKING, made.options, image)
        images[part] = image
    return Opened(images, size, orientation)


def fit_images(opened: Opened, plan: Plan, call: Call) -> dict[str, Array]:
    """The row's images at the size that the call needs, processed by ``conditioning.make``."""
    conditioning = plan.spec.conditioning
    width, height = conditioning_size(plan, call)
    arrays = {}
    for number, (part, image) in enumerate(opened.images.items()):
        follows = number > 0 and part != "mask" and conditioning.resize == "multiple-of"
        policy = "fill" if follows else conditioning.resize
        if part == "mask":
            arrays[part] = fit_mask(
                match_mask(image, opened.images["image"]), width, height, policy
            )
            continue
        fitted = fit_image(image, width, height, policy)
        made = conditioning.make.get(part)
        if made is not None and made.name != SHRINKING:
            fitted = make_condition(made.name, made.options, fitted)
        arrays[part] = to_array(fitted)
    return arrays


def conditioning_size(plan: Plan, call: Call) -> Size:
    """(width, height) of the conditioning images of a call."""
    return call.width // plan.model.upscale, call.height // plan.model.upscale
