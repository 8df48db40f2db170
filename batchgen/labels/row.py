"""The labels of one row in the output: moved with the pixels, or withdrawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchgen.images.geometry import Affine, Array, Size
from batchgen.labels.mask import LabelMask
from batchgen.labels.move import Move
from batchgen.labels.objects import Category, LabelObject
from batchgen.labels.truth import KEPT, REPAINTED, VOID, Rules


@dataclass(frozen=True)
class SourceLabels:
    """The labels of a row, on the pixels of its source image.

    ``objects`` and ``mask`` are None if the row has no such column. ``size`` is (width, height).
    """

    size: Size
    objects: tuple[LabelObject, ...] | None = None
    mask: LabelMask | None = None


@dataclass(frozen=True)
class RowLabels:
    """The labels of the images made from a row, in their pixels.

    Attributes:
        are: ``kept``, ``requested``, ``repainted`` or ``void``.
        source: (width, height) of the source image, as its labels have it; None without one.
        fit: the map from the source image's pixels to those of the made image: xx, xy, x0, yx, yy,
            y0, see `images.geometry.Affine`; None without a source.
        objects: None if they are void.
        dropped: number of objects that were cut away or repainted.
        mask: None if it is void.
    """

    are: str
    source: Size | None = None
    fit: Affine | None = None
    objects: tuple[LabelObject, ...] | None = None
    dropped: int = 0
    mask: LabelMask | None = None


def moved(labels: SourceLabels, move: Move, least: float, ignored: int) -> SourceLabels:
    """The labels after a move of their image.

    Objects of which less than the share ``least`` is left are gone; padding has the class
    ``ignored``.
    """
    kept = None
    if labels.objects is not None:
        both = [move.object(one) for one in labels.objects]
        kept = tuple(one for one, share in both if one is not None and share >= least)
    mask = None if labels.mask is None else labels.mask.moved(move, ignored)
    return SourceLabels(move.target, kept, mask)


def row_labels(
    fitted: SourceLabels,
    before: int,
    move: Move,
    upscale: int,
    are: str,
    rules: Rules,
    area: Array | None,
    category: Category | None,
) -> RowLabels:
    """What the output says of the labels of a row.

    Args:
        fitted: the labels on the conditioning image.
        before: the number of objects of the source image.
        move: from the source image to the conditioning image.
        upscale: the made image's size over that of the conditioning image.
        are: see `truth.truth_of`.
        rules: those of the job.
        area: where inpainting repaints, on the conditioning image: uint8 (height, width), 255 is
            repainted; None without inpainting.
        category: that of repainted objects; None: they are dropped.
    """
    size = (move.target[0] * upscale, move.target[1] * upscale)
    larger = Move(Affine(xx=upscale, yy=upscale), move.target, size)
    fit = move.by.then(larger.by)
    if are == VOID:
        return RowLabels(VOID, move.source, fit)
    if are == REPAINTED and area is not None:
        fitted, touched = _repainted(fitted, area > 0, rules, category)
        are = REPAINTED if touched else KEPT
    last = moved(fitted, larger, 0.0, rules.ignored_class)  # cuts nothing
    dropped = before - len(last.objects or ())
    return RowLabels(are, move.source, fit, last.objects, dropped, last.mask)


def _repainted(
    labels: SourceLabels, area: Array, rules: Rules, category: Category | None
) -> tuple[SourceLabels, bool]:
    """The labels after inpainting, and whether it has touched any of them."""
    kept: list[LabelObject] = []
    touched = False
    for one in labels.objects or ():
        if _share(one, area, labels.size) <= rules.max_repainted:
            kept.append(one)
            continue
        touched = True
        if category is not None:
            new = LabelObject(one.box, category, others={"id": one.others.get("id")})
            kept.append(new)
    mask = labels.mask
    if mask is not None and area.any():
        mask, touched = mask.without(area, rules.ignored_class), True
    objects = None if labels.objects is None else tuple(kept)
    return SourceLabels(labels.size, objects, mask), touched


def _share(one: LabelObject, area: Array, size: Size) -> float:
    """The share of an object's pixels that lie in ``area``."""
    pixels = one.mask(size)
    count = int(pixels.sum())
    return float(np.logical_and(pixels, area).sum()) / count if count else 0.0
