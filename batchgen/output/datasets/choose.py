"""Chooses the layout of an exported dataset by its name, and refuses outputs without its labels."""

from __future__ import annotations

import re

from batchgen.errors import InputError, SpecError
from batchgen.output.datasets.coco import Coco
from batchgen.output.datasets.layout import Layout
from batchgen.output.datasets.masks import Masks
from batchgen.output.datasets.voc import Voc
from batchgen.output.datasets.write import Totals, export_dataset
from batchgen.output.datasets.yolo import Yolo
from batchgen.output.ledger import Ledger
from batchgen.output.restrict import Chosen
from batchgen.plan.plan import Plan
from batchgen.storage import Store

LAYOUTS = ("coco", "yolo", "voc", "mask-png")
VOID = ("skip", "empty", "refuse")
_SHAPES = re.compile(r"\b(segmentation|rle): ")  # fields of the column of objects


def export_to(
    source: Ledger,
    target: Store,
    name: str,
    void: str = "skip",
    segments: bool = False,
    chosen: Chosen | None = None,
) -> Totals:
    """Write the finished output at ``source``, or these samples of it, as a dataset.

    Raises:
        SpecError: there is no such layout or choice.
        InputError: the output does not have the labels that it needs.
        Others: see ``write.export_dataset``.
    """
    if name not in LAYOUTS:
        raise SpecError("--to", name, ", ".join(LAYOUTS))
    if void not in VOID:
        raise SpecError("--void", void, ", ".join(VOID))
    if segments and name != "yolo":
        raise SpecError("--segments", name, "", because=f"{name} has no use for it; use --to yolo")
    parts = source.parts()
    layout = _layout(source, parts[0], name, segments)
    settings = {"to": name, "void": void, "segments": segments}
    return export_dataset(source, parts, target, layout, void, settings, chosen)


def _layout(source: Ledger, plan: Plan, name: str, segments: bool) -> Layout:
    columns = plan.spec.input.columns
    if name == "mask-png":
        if columns.label_mask is None and not _has_shapes(plan):
            raise _missing(source, name, "label_mask, or objects with segmentation or rle")
        labels = plan.spec.labels
        known = labels.mask_classes or (labels.categories if columns.objects is None else ()) or ()
        names = tuple(one.name for one in known)
        return Masks(columns.label_mask is None, names, labels.ignored_class)
    if columns.objects is None:
        other = "; its label masks go out with --to mask-png" if columns.label_mask else ""
        raise _missing(source, name, f"objects{other}")
    layouts: dict[str, Layout] = {"coco": Coco(), "yolo": Yolo(segments), "voc": Voc()}
    return layouts[name]


def _missing(source: Ledger, name: str, what: str) -> InputError:
    return InputError(
        f"source {source.store.url} has no labels for --to {name}; missing: the column {what} "
        "(input.columns.objects and label_mask name the columns of the input)"
    )


def _has_shapes(plan: Plan) -> bool:
    """Whether the objects of the input have a field of polygons or masks."""
    column = plan.spec.input.columns.objects
    return column is not None and _SHAPES.search(dict(plan.columns)[column]) is not None
