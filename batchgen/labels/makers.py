"""Conditions drawn from labels: masks, canvases, palettes and layouts (``conditioning.make``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from batchgen.errors import RejectRow
from batchgen.images.conditions import MAKERS, Makers, Option, grow_mask, settings_of
from batchgen.images.geometry import Array, Size
from batchgen.labels.mask import LabelMask
from batchgen.labels.objects import LabelObject
from batchgen.labels.row import SourceLabels

Colour = tuple[int, int, int]
MOST_GROWN_PX = 512


@dataclass(frozen=True)
class Names:
    """Names and colours of the categories by number; empty if they are not known.

    ``mask_colours``: those of the classes in label masks.
    """

    names: Sequence[str] = ()
    colours: Sequence[Colour | None] = ()
    mask_colours: Sequence[Colour | None] = ()

    def phrase(self, category: int | str) -> str:
        """The name of a category; its number as text if it has no name."""
        is_known = isinstance(category, int) and category < len(self.names)
        return self.names[category] if is_known else str(category)  # type: ignore[index]

    def number(self, category: int | str) -> int:
        """The number of a category; of a name that is not known, 0."""
        if isinstance(category, int):
            return category
        return list(self.names).index(category) if category in self.names else 0

    def colour(self, number: int) -> Colour:
        """The colour of a category: its own, else that of Pascal VOC's colour map."""
        own = self.colours[number] if number < len(self.colours) else None
        return own or voc_colour(number + 1)  # 0 is black, the background


@dataclass(frozen=True)
class LabelMaker:
    """Draws a condition from the labels of a row, on the pixels of the conditioning image.

    Attributes:
        name: as in ``conditioning.make``.
        about: what it draws.
        part: the part of a row that it makes: ``mask``, ``control`` (or ``control_1`` and so on) or
            ``regions``.
        reads: the labels that it needs: ``objects`` or ``label_mask``.
        make: labels, names and options -> a mask bool (height, width), an RGB image uint8
            (height, width, 3), or regions.
    """

    name: str
    about: str
    part: str
    reads: str
    make: Callable[..., Any]
    options: Mapping[str, Option] = field(default_factory=dict)


def make_from_labels(
    name: str, options: Mapping[str, float], labels: SourceLabels, names: Names
) -> Any:
    """Draw a condition from labels that lie on the conditioning image.

    Returns:
        For ``mask`` uint8 (height, width), 255 is repainted; for ``control`` uint8 (height, width,
        3); for ``regions`` a list of ``{phrase, box}`` with boxes as fractions of the size.

    Raises:
        RejectRow: ``empty-mask``, ``null-label_mask`` or ``bad-regions``: there is nothing to draw.
    """
    maker = LABEL_MAKERS[name]
    if maker.reads == "label_mask" and labels.mask is None:
        raise RejectRow("null-label_mask", f"the label mask is null; {name} needs one")
    made = maker.make(labels, names, **settings_of(name, options, LABEL_MAKERS))
    if maker.part != "mask":
        return made
    if not made.any():
        raise RejectRow("empty-mask", f"{name} selects nothing: the row has no such labels")
    return np.where(made, np.uint8(255), np.uint8(0))


def voc_colour(number: int) -> Colour:
    """A colour of Pascal VOC's map (Everingham et al., 2010): bits of the number, spread."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (number >> channel & 1) << (7 - bit)
        number >>= 3
    return channels[0], channels[1], channels[2]


def _chosen(labels: SourceLabels, category: float, names: Names) -> list[LabelObject]:
    objects = labels.objects or ()
    return [one for one in objects if category < 0 or names.number(one.category) == category]


def _finished(pixels: Array, invert: float, grow: float) -> Array:
    """Grow a mask by some pixels in all directions, and invert it."""
    grown = grow_mask(pixels, int(grow)) if grow else pixels
    return np.logical_not(grown) if invert else grown


def _objects_mask(
    labels: SourceLabels, names: Names, category: float, boxes: float, grow: float, invert: float
) -> Array:
    pixels = np.zeros((labels.size[1], labels.size[0]), dtype=bool)
    for one in _chosen(labels, category, names):
        pixels |= _box_of(one, labels.size) if boxes else one.mask(labels.size)
    if not pixels.any():  # also where all but the objects is wanted: nobody asked for everything
        return pixels
    return _finished(pixels, invert, grow)


def _box_of(one: LabelObject, size: Size) -> Array:
    return LabelObject(one.box, one.category).mask(size)


def _class_mask(
    labels: SourceLabels, names: Names, number: float, grow: float, invert: float
) -> Array:
    assert labels.mask is not None
    pixels: Array = labels.mask.classes == number
    return _finished(pixels, invert, grow) if pixels.any() else pixels


def _canvas(labels: SourceLabels, names: Names, boxes: float) -> Array:
    canvas = np.zeros((labels.size[1], labels.size[0], 3), dtype=np.uint8)
    largest_first = sorted(labels.objects or (), key=lambda one: -one.box[2] * one.box[3])
    for one in largest_first:
        pixels = _box_of(one, labels.size) if boxes else one.mask(labels.size)
        canvas[pixels] = names.colour(names.number(one.category))
    return canvas


def _palette(labels: SourceLabels, names: Names) -> Array:
    assert labels.mask is not None
    classes = labels.mask.classes.astype(np.int64)
    table = colour_table(labels.mask, names.mask_colours)
    coloured: Array = table[np.minimum(classes, len(table) - 1)]
    return coloured


def colour_table(mask: LabelMask, colours: Sequence[Colour | None]) -> Array:
    """Colours by class, uint8 (n, 3): those given, the mask's own, or Pascal VOC's."""
    count = max(256, int(mask.classes.max(initial=0)) + 1)
    if any(colours):
        black = (0, 0, 0)
        rows = [one or black for one in colours][:count]
        return np.array([*rows, *[black] * (count - len(rows))], dtype=np.uint8)
    if mask.palette is not None:
        return np.frombuffer(mask.palette, dtype=np.uint8).reshape(-1, 3)
    return np.array([voc_colour(number & 255) for number in range(count)], dtype=np.uint8)


def _regions(labels: SourceLabels, names: Names) -> list[dict[str, Any]]:
    width, height = labels.size
    found = []
    for one in labels.objects or ():
        x, y, across, down = one.box
        box = [x / width, y / height, (x + across) / width, (y + down) / height]
        found.append({"phrase": names.phrase(one.category), "box": box})
    if not found:
        raise RejectRow("bad-regions", "the row has no objects; objects-regions needs one or more")
    return found


_ALL = Option(-1, -1, 65535)
_YES = Option(0, 0, 1)
_GROW = Option(0, 0, MOST_GROWN_PX)
_MAKERS = (
    LabelMaker(
        "objects-mask",
        "white where objects are: their polygons or masks, else their boxes",
        "mask",
        "objects",
        _objects_mask,
        {"category": _ALL, "boxes": _YES, "grow": _GROW, "invert": _YES},
    ),
    LabelMaker(
        "class-mask",
        "white where the label mask has this class",
        "mask",
        "label_mask",
        _class_mask,
        {"number": Option(1, 0, 65535), "grow": _GROW, "invert": _YES},
    ),
    LabelMaker(
        "objects-canvas",
        "objects filled with the colour of their category, on black",
        "control",
        "objects",
        _canvas,
        {"boxes": _YES},
    ),
    LabelMaker(
        "palette",
        "the label mask in colours: those of labels.mask_classes, else the mask's own palette, "
        "else Pascal VOC's",
        "control",
        "label_mask",
        _palette,
    ),
    LabelMaker(
        "objects-regions",
        "the objects' categories and boxes as a layout",
        "regions",
        "objects",
        _regions,
    ),
)
LABEL_MAKERS: Mapping[str, LabelMaker] = MappingProxyType({one.name: one for one in _MAKERS})
EVERY_MAKER: Makers = MappingProxyType({**MAKERS, **LABEL_MAKERS})
