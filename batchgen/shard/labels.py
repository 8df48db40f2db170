"""Reads the labels of a shard's rows, and moves them with the images that are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.errors import RejectRow
from batchgen.images.geometry import Size, fit_map, orientation_map, scaling
from batchgen.labels.columns import labels_schema, labels_table
from batchgen.labels.makers import Names, make_from_labels
from batchgen.labels.mask import read_mask
from batchgen.labels.move import Move
from batchgen.labels.objects import Category, read_category, read_objects
from batchgen.labels.row import RowLabels, SourceLabels, moved, row_labels
from batchgen.labels.truth import VOID, truth_of
from batchgen.plan.plan import Plan
from batchgen.records import Call
from batchgen.shard.row_images import Array, Fetched, Opened, conditioning_size, file_of
from batchgen.spec.spec import Spec


@dataclass(frozen=True)
class Labelled:
    """The labels of the images made from a row, and the conditions drawn from its labels.

    ``images``: part -> array, as `prepare.Prepared.images` has them. ``regions``: a layout.
    """

    labels: RowLabels | None = None
    images: Mapping[str, Array] = field(default_factory=dict)
    regions: list[dict[str, Any]] | None = None


def labels_of(
    values: Mapping[str, Any],
    opened: Opened,
    arrays: Mapping[str, Array],
    plan: Plan,
    call: Call,
    fetched: Fetched,
) -> Labelled:
    """Read the labels of a row, draw conditions from them, and move them with the pixels.

    Raises:
        RejectRow: ``bad-objects``, ``bad-label_mask`` and so on: a label that is wrong, or that
            does not belong to its image.
    """
    spec = plan.spec
    if not spec.has_labels:
        return Labelled()
    parts = (*spec.image_parts, *(part for part in ("regions",) if _has(part, spec)))
    are = truth_of(spec.labels, spec.task, call.strength, parts, made=_is_layout(spec))
    if are == VOID and opened.size is None and not spec.drawn:
        return Labelled(RowLabels(VOID))
    target = conditioning_size(plan, call)
    source = _source(values, opened, plan, target, fetched)
    move = _move(opened, source.size, plan, target)
    fitted = moved(source, move, spec.labels.min_visibility, spec.labels.ignored_class)
    names = Names(spec.labels.names or (), spec.labels.colours, spec.labels.mask_colours)
    drawn = {
        part: make_from_labels(made.name, made.options, fitted, names)
        for part, made in spec.drawn.items()
    }
    regions = drawn.pop("regions", None)
    labels = row_labels(
        fitted,
        len(source.objects or ()),
        move,
        plan.model.upscale,
        are,
        spec.labels,
        {**arrays, **drawn}.get("mask"),
        _new_category(values, plan),
    )
    return Labelled(labels, drawn, regions)


def _has(part: str, spec: Spec) -> bool:
    return part in spec.drawn or part in spec.input.columns.mapped()


def _is_layout(spec: Spec) -> bool:
    """Whether the model is asked for a layout that is drawn from the labels."""
    return any(part != "mask" for part in spec.drawn)


def table_of(rows: Sequence[RowLabels | None], plan: Plan, source: pa.Schema) -> pa.Table | None:
    """The labels of a shard's rows, one row each; None if the spec names no labels."""
    if not plan.spec.has_labels:
        return None
    columns, named = plan.spec.input.columns, plan.spec.labels.names is not None
    objects = None if columns.objects is None else source.field(columns.objects).type
    return labels_table(rows, labels_schema(objects, columns.label_mask is not None, named))


def _source(
    values: Mapping[str, Any], opened: Opened, plan: Plan, target: Size, fetched: Fetched
) -> SourceLabels:
    """The labels as the row has them, on the source image's pixels."""
    spec, columns = plan.spec, plan.spec.input.columns
    size = _stored_size(values, opened, plan)
    mask = None
    if columns.label_mask is not None and values["label_mask"]:
        data = file_of(values, "label_mask", fetched)
        mask = read_mask(data, spec.input.image_limit_pixels, size)
        size = mask.size
    if columns.objects is None:
        return SourceLabels(size or target, None, mask)
    if size is None:
        if spec.labels.objects_format != "yolo":
            raise RejectRow(
                "bad-objects",
                f"column {columns.objects!r}: the size of its image is not known; needed: an "
                "image, or columns in input.columns.image_width and image_height",
            )
        size = target
    box_format, names = spec.labels.objects_format, spec.labels.names
    objects = read_objects(values["objects"], size, box_format, names, columns.objects)
    return SourceLabels(size, objects, mask)


def _stored_size(values: Mapping[str, Any], opened: Opened, plan: Plan) -> Size | None:
    """(width, height) of the image on whose pixels the labels lie; None if it is not known."""
    if opened.size is not None:
        turned = opened.orientation >= 5
        return (opened.size[1], opened.size[0]) if turned else opened.size
    sides = [values.get(name) for name in ("image_width", "image_height")]
    if all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]  # type: ignore[return-value]
    return None


def _move(opened: Opened, stored: Size, plan: Plan, target: Size) -> Move:
    """From the pixels on which the labels lie to those of the conditioning image."""
    policy = plan.spec.conditioning.resize
    if opened.size is None:
        policy = "fill" if policy == "multiple-of" else policy
        return Move(fit_map(stored, target, policy), stored, target)
    upright = orientation_map(opened.orientation, opened.size)
    before = next(iter(opened.images.values())).size  # smaller if a maker has shrunk it
    shrunk = scaling(opened.size, before)
    return Move(upright.then(shrunk).then(fit_map(before, target, policy)), stored, target)


def _new_category(values: Mapping[str, Any], plan: Plan) -> Category | None:
    column = plan.spec.input.columns.new_category
    if column is None or values["new_category"] is None:
        return None
    return read_category(values["new_category"], repr(column), plan.spec.labels.names)
