"""COCO: ``images/SPLIT/KEY.png`` and ``annotations/instances_SPLIT.json``.

Format: cocodataset.org, "Data format"; run lengths are compressed, as pycocotools reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from batchgen import __version__
from batchgen.errors import InputError
from batchgen.labels.columns import OBJECTS
from batchgen.labels.move import polygon_area
from batchgen.labels.objects import LabelObject
from batchgen.labels.rle import decoded
from batchgen.output.datasets.classes import Classes
from batchgen.output.datasets.layout import Entries, File, Made
from batchgen.output.datasets.sample import LabelledImage
from batchgen.plan.plan import Plan

MOST_OBJECTS = 100_000  # of one image; ids of annotations stay below 2**53, exact in any reader
_NO_LICENSE = "unknown"


class Coco:
    """The layout ``coco``.

    The id of an image is the number of its sample in the plan, from 1 on. The id of an annotation
    is ``image id * 100000 + number of the object in its image``, from 1 on. So ids do not depend on
    which other images are accepted or exported.
    """

    column = OBJECTS

    def image(self, image: LabelledImage, classes: Classes) -> Made:
        if len(image.objects) >= MOST_OBJECTS:
            raise InputError(
                f"image {image.key} has {len(image.objects)} objects; allowed: fewer than "
                f"{MOST_OBJECTS} in one image of a COCO file"
            )
        number = image.number + 1
        record = {
            "id": number,
            "file_name": image.file,
            "width": image.size[0],
            "height": image.size[1],
            "batchgen": dict(image.facts),
        }
        annotations = [
            {"id": number * MOST_OBJECTS + place, "image_id": number, **_annotation(one, classes)}
            for place, one in enumerate(image.objects, start=1)
        ]
        entry = {"image": record, "annotations": annotations}
        return Made([(f"images/{image.split}/{image.file}", image.data)], entry, len(annotations))

    def last(
        self, splits: Sequence[str], entries: Entries, classes: Classes, plan: Plan
    ) -> Iterator[File]:
        for split in splits:
            yield f"annotations/instances_{split}.json", _file(entries(split), classes, plan)


def _annotation(one: LabelObject, classes: Classes) -> dict[str, Any]:
    """An object as a COCO annotation, without ids of its own."""
    annotation = {
        "category_id": classes.ids[classes.place(one.category)],
        "bbox": list(one.box),
        "area": area_of(one),
        "iscrowd": one.iscrowd,
        "segmentation": _segmentation(one),
    }
    if one.keypoints:
        points = one.keypoints
        annotation["keypoints"] = [value for x, y, seen in points for value in (x, y, seen)]
        annotation["num_keypoints"] = sum(seen > 0 for *_, seen in points)
    if one.others.get("id") is not None:
        annotation["source_id"] = one.others["id"]
    taken = ("id", "image_id", *annotation)
    return annotation | {
        name: value for name, value in one.others.items() if name not in taken and value is not None
    }


def _segmentation(one: LabelObject) -> Any:
    if one.rle is not None:
        return {"size": list(one.rle.size), "counts": one.rle.counts}
    return [list(polygon) for polygon in one.polygons]


def area_of(one: LabelObject) -> float:
    """The area of an object: as its source says, else of its mask, its polygons or its box."""
    if one.area is not None:
        return one.area
    if one.rle is not None:
        return float(decoded(one.rle).sum())
    if one.polygons:
        return sum(polygon_area(polygon) for polygon in one.polygons)
    return one.box[2] * one.box[3]


def _file(entries: Iterator[Any], classes: Classes, plan: Plan) -> bytes:
    """The JSON of one split. It is composed as text: a parsed one takes ten times the memory."""
    images, annotations = bytearray(), bytearray()
    for entry in entries:
        _append(images, [entry["image"]], plan)
        _append(annotations, entry["annotations"], plan)
    spec = plan.spec
    licensed = spec.output.license != _NO_LICENSE
    head = {
        "info": {
            "description": "Synthetic images, generated with batchgen",
            "version": __version__,
            "plan_fingerprint": plan.fingerprint,
            **({"source": spec.labels.source} if spec.labels.source else {}),
        },
        "licenses": [{"id": 1, "name": spec.output.license, "url": ""}] if licensed else [],
        "categories": [_category(place, classes) for place in range(len(classes.categories))],
    }
    text = _text(head)[:-1]  # without the last brace
    return b"".join(
        (text, b', "images": [', images, b'\n], "annotations": [', annotations, b"\n]}\n")
    )


def _append(lines: bytearray, values: Sequence[dict[str, Any]], plan: Plan) -> None:
    for value in values:
        if "file_name" in value and plan.spec.output.license != _NO_LICENSE:
            value = {**value, "license": 1}
        lines += (b",\n" if lines else b"\n") + _text(value)


def _text(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _category(place: int, classes: Classes) -> dict[str, Any]:
    one = classes.categories[place]
    told: dict[str, Any] = {"id": classes.ids[place], "name": one.name}
    if one.supercategory is not None:
        told["supercategory"] = one.supercategory
    if one.keypoints:
        told["keypoints"] = list(one.keypoints)
        told["skeleton"] = [list(pair) for pair in one.skeleton]
    return told
