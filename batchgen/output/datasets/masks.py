"""Label masks: ``images/SPLIT/KEY.png``, ``masks/SPLIT/KEY.png`` and ``classes.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from batchgen.errors import InputError, RejectRow
from batchgen.images.geometry import Array
from batchgen.labels.columns import OBJECTS
from batchgen.labels.mask import LabelMask, read_mask
from batchgen.output.datasets.classes import Classes
from batchgen.output.datasets.layout import Entries, File, Made
from batchgen.output.datasets.sample import MASK, LabelledImage
from batchgen.plan.plan import Plan

BACKGROUND = "background"
BOXES = "left out: no polygon or mask"
_LARGEST = 254  # number of categories that a mask of 8 bits can have next to the background


@dataclass(frozen=True)
class Masks:
    """The layout ``mask-png``: class numbers as the pixels of a PNG of one channel.

    Attributes:
        drawn: the output has no ``label_mask``, so that the objects are drawn: the background is 0
            and a category its place in the list, from 1 on. Later objects are drawn over earlier
            ones. Objects that have only a box are left out.
        names: those of the classes in the column ``label_mask``, by number; empty if they are not
            known.
        ignored: the class of the pixels of an image whose labels are void.
    """

    drawn: bool
    names: tuple[str, ...]
    ignored: int

    @property
    def column(self) -> str:
        return OBJECTS if self.drawn else MASK

    def image(self, image: LabelledImage, classes: Classes) -> Made:
        notes: list[str] = []
        objects = 0
        if self.drawn:
            shaped = [one for one in image.objects if one.rle is not None or one.polygons]
            notes, objects = [BOXES] * (len(image.objects) - len(shaped)), len(shaped)
            mask = self._draw(image, classes)
            png = mask.png()
        elif image.mask is None:
            mask = self._void(image)
            png = mask.png()
        else:
            mask, png = self._read(image), image.mask
        files = [
            (f"images/{image.split}/{image.file}", image.data),
            (f"masks/{image.split}/{image.key}.png", png),
        ]
        return Made(files, np.unique(mask.classes).tolist(), objects, notes)

    def _void(self, image: LabelledImage) -> LabelMask:
        width, height = image.size
        return LabelMask(np.full((height, width), self.ignored, np.uint8))

    def _draw(self, image: LabelledImage, classes: Classes) -> LabelMask:
        if image.facts["labels_are"] == "void":
            return self._void(image)
        width, height = image.size
        kind = np.uint8 if len(classes.categories) <= _LARGEST else np.uint16
        pixels: Array = np.zeros((height, width), kind)
        for one in image.objects:
            if one.rle is not None or one.polygons:
                pixels[one.mask(image.size)] = classes.place(one.category) + 1
        return LabelMask(pixels)

    def _read(self, image: LabelledImage) -> LabelMask:
        try:
            mask = read_mask(image.mask, image.size[0] * image.size[1], None)
        except RejectRow as error:
            raise InputError(f"image {image.key}: {error}") from error
        if mask.size != image.size:
            raise InputError(
                f"image {image.key} has {image.size[0]} x {image.size[1]} pixels, its label mask "
                f"{mask.size[0]} x {mask.size[1]}"
            )
        return mask

    def last(
        self, splits: Sequence[str], entries: Entries, classes: Classes, plan: Plan
    ) -> Iterator[File]:
        found = {number for split in splits for entry in entries(split) for number in entry}
        drawn = [BACKGROUND, *(one.name for one in classes.categories)]
        names = drawn if self.drawn else list(self.names)
        told = dict(enumerate(names))
        told |= {number: f"class {number}" for number in found if number not in told}
        if self.ignored in found and self.ignored >= len(names):
            told[self.ignored] = "ignored"
        text = json.dumps({str(number): told[number] for number in sorted(told)}, indent=1)
        yield "classes.json", (text + "\n").encode()
