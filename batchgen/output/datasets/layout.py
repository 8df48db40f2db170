"""The interface of a dataset's layout: which files it has for an image, and which at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchgen.output.datasets.classes import Classes
from batchgen.output.datasets.sample import LabelledImage
from batchgen.plan.plan import Plan

File = tuple[str, bytes]
Entries = Callable[[str], Iterator[Any]]


@dataclass(frozen=True)
class Made:
    """What a layout makes of one image.

    Attributes:
        files: name and bytes, in the order to write them.
        entry: JSON value that the last files need; None if they need nothing.
        objects: number of objects that are labelled in it.
        notes: for each object that is left out or written in another way, the reason.
    """

    files: list[File]
    entry: Any = None
    objects: int = 0
    notes: list[str] = field(default_factory=list)


class Layout(Protocol):
    """The layout of a dataset. Images and labels of one image come first, annotations last."""

    @property
    def column(self) -> str:
        """The column of labels that it reads, ``objects`` or ``label_mask``."""
        ...

    def image(self, image: LabelledImage, classes: Classes) -> Made:
        """The files of one image."""
        ...

    def last(
        self, splits: Sequence[str], entries: Entries, classes: Classes, plan: Plan
    ) -> Iterator[File]:
        """The files that make the dataset complete.

        Args:
            splits: the splits that have images, sorted.
            entries: gives the entries of a split, in the plan's order.
            classes, plan: those of the export.
        """
        ...
