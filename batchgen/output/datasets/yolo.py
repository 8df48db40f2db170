"""YOLO: ``images/SPLIT/KEY.png``, ``labels/SPLIT/KEY.txt`` and ``data.yaml``.

Format: Ultralytics, "Object Detection Datasets" and "Instance Segmentation Datasets".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from batchgen.errors import InputError
from batchgen.images.geometry import Size
from batchgen.labels.columns import OBJECTS
from batchgen.labels.objects import LabelObject
from batchgen.labels.rle import Polygon
from batchgen.output.datasets.classes import Classes
from batchgen.output.datasets.layout import Entries, File, Made
from batchgen.output.datasets.sample import TRAIN, LabelledImage
from batchgen.plan.plan import Plan

CROWDS = "crowds left out: YOLO has none"
BOXED = "written as boxes: an object of their image has no polygon"
_MEANINGS = {
    TRAIN: ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KEYS = ("path", "train", "val", "test", "names", "nc", "download")
_NO_PATH = (
    "# There is no `path`: the folders are next to this file. Old readers need it; set it to the "
    "folder of this file.\n"
)
_NO_VALIDATION = (
    "# There is no validation split; readers need `val`, so it names the same images.\n"
)


@dataclass(frozen=True)
class Yolo:
    """The layout ``yolo``. An image without objects has an empty label file.

    A line is the number of the category and the box: centre x, centre y, width and height, as
    fractions of the image's size. With ``segments``, the lines of an image whose objects all have
    polygons are polygons; those of other images stay boxes. Crowds are left out.
    """

    segments: bool = False
    column = OBJECTS

    def image(self, image: LabelledImage, classes: Classes) -> Made:
        objects = [one for one in image.objects if not one.iscrowd]
        notes = [CROWDS] * (len(image.objects) - len(objects))
        outlined = self.segments and all(one.polygons for one in objects)
        if self.segments and not outlined:
            notes += [BOXED] * len(objects)
        line = _polygon_line if outlined else _box_line
        lines = [line(one, image.size, classes.place(one.category)) for one in objects]
        files = [
            (f"images/{image.split}/{image.file}", image.data),
            (f"labels/{image.split}/{image.key}.txt", "".join(lines).encode()),
        ]
        return Made(files, None, len(objects), notes)

    def last(
        self, splits: Sequence[str], entries: Entries, classes: Classes, plan: Plan
    ) -> Iterator[File]:
        meant = {split: meaning(split) for split in splits}
        train = next((one for one in splits if meant[one] == TRAIN), None)
        train = train or next((one for one in splits if meant[one] is None), None)
        if train is None:
            raise InputError(
                f"no split to train on: the splits are {', '.join(splits)}; name one of them train"
            )
        validation = next((one for one in splits if meant[one] == "validation"), None)
        test = next((one for one in splits if meant[one] == "test"), None)
        others = [one for one in splits if one not in (train, validation, test, *_KEYS)]
        tree: dict[str, Any] = {
            "train": f"images/{train}",
            "val": f"images/{validation or train}",
            **({"test": f"images/{test}"} if test else {}),
            **{split: f"images/{split}" for split in others},
            "names": {place: one.name for place, one in enumerate(classes.categories)},
        }
        notes = _NO_PATH + ("" if validation else _NO_VALIDATION)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        yield "data.yaml", (notes + text).encode()


def meaning(split: str) -> str | None:
    """What the name of a split means: train, validation or test; None for any other name."""
    words = set(re.split(r"[^a-z]+", split.lower()))
    found = [name for name, known in _MEANINGS.items() if words & set(known)]
    return found[0] if len(found) == 1 else None


def _box_line(one: LabelObject, size: Size, place: int) -> str:
    x, y, width, height = one.box
    shares = ((x + width / 2) / size[0], (y + height / 2) / size[1])
    return _line(place, (*shares, width / size[0], height / size[1]))


def _polygon_line(one: LabelObject, size: Size, place: int) -> str:
    points = np.array(joined(one.polygons)).reshape(-1, 2)  # (points, 2)
    return _line(place, (points / np.array(size)).ravel().tolist())


def _line(place: int, numbers: Sequence[float]) -> str:
    """One line; nine digits keep a coordinate to a millionth of a pixel."""
    return " ".join([str(place), *(f"{min(max(n, 0.0), 1.0):.9g}" for n in numbers)]) + "\n"


def joined(polygons: Sequence[Polygon]) -> Polygon:
    """One polygon of the same area as several: bridges of no width join their nearest points."""
    whole = np.array(polygons[0]).reshape(-1, 2)
    for polygon in polygons[1:]:
        part = np.array(polygon).reshape(-1, 2)
        distances = ((whole[:, None] - part[None]) ** 2).sum(axis=2)  # (points, points of part)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        loop = np.concatenate([part[there:], part[: there + 1]])
        whole = np.concatenate([whole[: here + 1], loop, whole[here:]])
    return tuple(whole.ravel().tolist())
