"""A scorer by an object detector: whether the labelled objects can be seen where they should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores

FAILED = "objects_failed"  # name of a score: for each object, whether it becomes iscrowd


class Seen(NamedTuple):
    """One detected object: class number of the detector, its score, x0, y0, x1, y1 in pixels."""

    kind: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectsFound:
    """Compares labelled objects with those that a detector sees.

    Attributes:
        detect: images -> for each what is detected, above the detector's threshold.
        names: the detector's classes.
        classes: value of an object's category, as text -> number of its class in the detector.
        min_iou: an object is found if one of its class overlaps it by at least this.
        marks: whether objects that are not found become ``iscrowd`` in the output.
        fingerprint: of the model and its settings.
    """

    detect: Callable[[Sequence[Array]], list[list[Seen]]]
    names: tuple[str, ...]
    classes: Mapping[str, int]
    min_iou: float
    marks: bool
    fingerprint: str
    reads: tuple[str, ...] = ("objects",)
    compares: bool = False

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        return (
            ScoreColumn(
                "object_iou",
                pa.list_(pa.float32()),
                "for each object: largest overlap (IoU) with a detected one of its class",
            ),
            ScoreColumn(
                "object_class",
                pa.list_(pa.string()),
                "for each object: class of the detected one that overlaps it most, if any does",
            ),
            ScoreColumn(
                "objects_found",
                pa.int32(),
                f"number of objects with an object_iou of at least {self.min_iou:g}",
            ),
            ScoreColumn(
                "objects_extra", pa.int32(), "number of detected objects that overlap no object"
            ),
        )

    @property
    def figures(self) -> tuple[str, ...]:
        return (FAILED,) if self.marks else ()

    def __call__(self, images: Scored) -> Scores:
        pairs = zip(self.detect(images.pixels), images.rows["objects"], strict=True)
        judged = [self._judge(seen, objects) for seen, objects in pairs]
        found: dict[str, list[Any]] = {
            name: [one[name] for one in judged] for name in (one.name for one in self.columns)
        }
        if self.marks:
            found[FAILED] = [one[FAILED] for one in judged]
        return found

    def _judge(self, seen: Sequence[Seen], objects: Mapping[str, Any] | None) -> dict[str, Any]:
        if objects is None:  # its labels are void
            return dict.fromkeys((*(one.name for one in self.columns), FAILED))
        boxes = [(x, y, x + width, y + height) for x, y, width, height in objects["bbox"]]
        kinds = [self.classes.get(str(one)) for one in objects["category"]]
        overlaps = [[overlap(box, one.box) for one in seen] for box in boxes]
        best = [
            max((iou for iou, one in zip(row, seen, strict=True) if one.kind == kind), default=0.0)
            for row, kind in zip(overlaps, kinds, strict=True)
        ]
        return {
            "object_iou": [float(np.float32(iou)) for iou in best],
            "object_class": [self._class_at(row, seen) for row in overlaps],
            "objects_found": sum(iou >= self.min_iou for iou in best),
            "objects_extra": sum(
                all(row[number] < self.min_iou for row in overlaps) for number in range(len(seen))
            ),
            FAILED: [iou < self.min_iou for iou in best],
        }

    def _class_at(self, row: Sequence[float], seen: Sequence[Seen]) -> str | None:
        place = max(range(len(row)), key=row.__getitem__, default=None)
        return None if place is None or row[place] <= 0 else self.names[seen[place].kind]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] + areas[1] - width * height)
