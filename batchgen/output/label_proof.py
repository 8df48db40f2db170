"""Checks the labels of a shard's rows: they lie on their images, and void ones are not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from batchgen.images.files import size_of
from batchgen.labels.columns import OBJECTS
from batchgen.labels.truth import KEPT, REPAINTED, REQUESTED, VOID

CHECKED = ("labels_are", OBJECTS, "label_mask")
_SLACK_PX = 1e-3  # coordinates are rounded


def label_faults(table: pa.Table) -> Iterator[str]:
    """A message for each row whose labels no run would write; nothing without labels."""
    names = [name for name in ("key", "width", "height", *CHECKED) if name in table.column_names]
    if "labels_are" not in names:
        return
    for row in table.select(names).to_pylist():
        fault = _fault(row)
        if fault:
            yield f"labels of {row['key']}: {fault}"


def _fault(row: Mapping[str, Any]) -> str:
    are, size = row["labels_are"], (row["width"], row["height"])
    if are not in (KEPT, REQUESTED, REPAINTED, VOID):
        return f"labels_are is {are!r}"
    objects, mask = row.get(OBJECTS), row.get("label_mask")
    if are == VOID:
        return "they are void, but are written" if objects or mask else ""
    if OBJECTS in row and objects is None:
        return f"they are {are}, but objects is null"
    if mask is not None and size_of(mask["bytes"], size) != size:
        return f"the label mask is no image of {size[0]} x {size[1]} pixels"
    for box in (objects or {}).get("bbox", ()):
        x, y, width, height = box
        inside = min(x, y) >= -_SLACK_PX and x + width <= size[0] + _SLACK_PX
        if not inside or y + height > size[1] + _SLACK_PX or min(width, height) <= 0:
            return f"the box {box} is not inside of {size[0]} x {size[1]} pixels"
    return ""
