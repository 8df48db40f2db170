"""Picks images for the report and the contact sheet, from shards spread over the output."""

from __future__ import annotations

import base64
import colorsys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.errors import BatchgenError
from batchgen.images.files import Mark, marked, thumbnail
from batchgen.labels.columns import OBJECTS
from batchgen.output.formats import format_of
from batchgen.output.ledger import DATA, Ledger
from batchgen.plain_text import short
from batchgen.plan.parts import Planned
from batchgen.plan.plan import Plan

IMAGES = 64
SHARDS = 8
THUMBNAIL_PX = 128
_GOLDEN = 0.618034  # steps of this part of the circle of hues keep apart
_UNREADABLE = (
    *(BatchgenError, OSError, ValueError, KeyError, TypeError, ArithmeticError),
    pa.ArrowException,
)


@dataclass(frozen=True)
class Shown:
    """One image on the page.

    Attributes:
        key, prompt: as text that is short.
        plain: a thumbnail, PNG.
        marks: the boxes of its objects.
    """

    key: str
    prompt: str
    plain: bytes
    marks: tuple[Mark, ...] = ()

    @property
    def data(self) -> bytes:
        """The thumbnail with its boxes."""
        return marked(self.plain, self.marks) if self.marks else self.plain

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.data).decode()


def shown_of(
    plan: Planned, ledger: Ledger, committed: list[int], unreadable: list[str]
) -> Iterator[Shown]:
    """Yields images from shards spread over the output, reading as little as possible.

    If images of a shard cannot be read or decoded, the rest of that shard is left out and its
    data file is added to ``unreadable``.
    """
    if not committed:
        return
    step = max(1, len(committed) // SHARDS)
    shards = committed[::step][:SHARDS]
    per_shard = -(-IMAGES // len(shards))
    for marker in ledger.markers(shards):
        names = [file.name for file in marker.files if file.name.startswith(f"{DATA}/")]
        damaged_name, part = names[0] if names else "", plan.of(marker.shard)
        try:
            for row in format_of(part).peek(ledger.store, names, per_shard):
                damaged_name = next((name for name in names if row["key"] in name), names[0])
                yield _thumb(row, part)
        except _UNREADABLE:
            unreadable.append(damaged_name)


def _thumb(row: dict[str, Any], plan: Plan) -> Shown:
    label = row["label"]
    caption = row["prompt"] or ("" if label is None else str(label))
    plain = thumbnail(row["image"], THUMBNAIL_PX)
    return Shown(short(row["key"]), short(caption), plain, _marks(row, plan))


def _marks(row: dict[str, Any], plan: Plan) -> tuple[Mark, ...]:
    """The boxes of an image's objects; none if its labels are void."""
    objects = row.get(OBJECTS) if plan.spec.input.columns.objects is not None else None
    if not objects:
        return ()
    width, height = row["width"], row["height"]
    return tuple(
        Mark(x / width, y / height, (x + w) / width, (y + h) / height, colour_of(category, plan))
        for (x, y, w, h), category in zip(objects["bbox"], objects["category"], strict=True)
    )


def colour_of(category: int | str, plan: Plan) -> tuple[int, int, int]:
    """The colour of a category, the same in every image: its own, else one far from the others'."""
    categories = plan.spec.labels.categories or ()
    names = [one.name for one in categories]
    place = names.index(category) if category in names else category
    if isinstance(place, str):
        place = zlib.crc32(place.encode())
    own = categories[place].colour if 0 <= place < len(categories) else None
    if own is not None:
        return own
    red, green, blue = colorsys.hsv_to_rgb(place * _GOLDEN % 1.0, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
