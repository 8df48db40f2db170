"""Pascal VOC: ``JPEGImages``, ``Annotations/KEY.xml``, ``ImageSets/Main/SPLIT.txt``.

Format: the VOC2012 development kit, section 8; ``labelmap.txt`` is CVAT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from batchgen.labels.columns import OBJECTS
from batchgen.labels.objects import LabelObject
from batchgen.output.datasets.classes import Classes
from batchgen.output.datasets.layout import Entries, File, Made
from batchgen.output.datasets.sample import LabelledImage
from batchgen.plan.plan import Plan
from batchgen.spec.labels_section import Category

CROWDS = "crowds written as difficult"
FLAGS = ("truncated", "occluded")  # written where the source says it
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_IN_LABELMAP = re.compile(r"[:\n\r]")


class Voc:
    """The layout ``voc``: boxes by their corners, as numbers of the first and last pixel from 1 on.

    Each side is rounded to the nearest pixel, so it moves by at most half a pixel. A box that is
    narrower than a pixel becomes one pixel wide. Crowds are difficult objects, which evaluation
    leaves out.
    """

    column = OBJECTS

    def image(self, image: LabelledImage, classes: Classes) -> Made:
        notes = [CROWDS for one in image.objects if one.iscrowd]
        files = [
            (f"JPEGImages/{image.file}", image.data),
            (f"Annotations/{image.key}.xml", _annotation(image, classes)),
        ]
        return Made(files, image.key, len(image.objects), notes)

    def last(
        self, splits: Sequence[str], entries: Entries, classes: Classes, plan: Plan
    ) -> Iterator[File]:
        lines = ["# label:color_rgb:parts:actions\n", *map(_map_line, classes.categories)]
        yield "labelmap.txt", "".join(lines).encode()
        for split in splits:
            text = "".join(f"{key}\n" for key in entries(split))
            yield f"ImageSets/Main/{split}.txt", text.encode()


def _map_line(category: Category) -> str:
    name = _NOT_IN_LABELMAP.sub("_", category.name)
    return f"{name}:{','.join(map(str, category.colour or ()))}::\n"


def _annotation(image: LabelledImage, classes: Classes) -> bytes:
    root = Element("annotation")
    _add(root, folder="JPEGImages", filename=image.file)
    _add(SubElement(root, "source"), database="batchgen")
    _add(SubElement(root, "size"), width=image.size[0], height=image.size[1], depth=3)
    _add(root, segmented=0)
    for one in image.objects:
        _add_object(root, one, classes.name(one.category))
    indent(root)
    return bytes(tostring(root, "utf-8")) + b"\n"


def _add_object(root: Element, one: LabelObject, name: str) -> None:
    xml = SubElement(root, "object")
    _add(xml, name=name, pose=one.others.get("pose") or "Unspecified")
    _add(xml, **{flag: _flag(one.others, flag) for flag in FLAGS if _known(one.others, flag)})
    _add(xml, difficult=int(bool(one.iscrowd or _flag(one.others, "difficult"))))
    left, top, right, bottom = corners(one)
    _add(SubElement(xml, "bndbox"), xmin=left, ymin=top, xmax=right, ymax=bottom)


def _known(others: Mapping[str, Any], flag: str) -> bool:
    return others.get(flag) is not None


def _flag(others: Mapping[str, Any], flag: str) -> int:
    return int(others.get(flag) not in (None, 0, "0", False, "false", ""))


def corners(one: LabelObject) -> tuple[int, int, int, int]:
    """The numbers of the first and last column and row of a box: left, top, right, bottom."""
    x, y, width, height = one.box
    left, right = _first_and_last(x, width)
    top, bottom = _first_and_last(y, height)
    return left, top, right, bottom


def _first_and_last(start: float, length: float) -> tuple[int, int]:
    """First and last pixel, from 1 on: pixel n covers n - 1 to n."""
    first, last = round(start) + 1, round(start + length)
    if last < first:  # narrower than a pixel: the one that its middle is in
        first = last = int(start + length / 2) + 1
    return first, last


def _add(parent: Element, **texts: object) -> None:
    for name, text in texts.items():
        SubElement(parent, name).text = _NOT_IN_XML.sub("\ufffd", str(text))
