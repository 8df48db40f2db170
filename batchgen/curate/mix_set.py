"""A training set of real and synthetic images: how it is mixed, its sets and its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchgen.curate.image_sets import ImageSet, SetRow
from batchgen.errors import SpecError

LABEL = "label"


@dataclass(frozen=True)
class Mix:
    """What is mixed.

    Attributes:
        real: the real set.
        synthetic: outputs, or sets, each as ``SET`` or ``OUTPUT:SELECTION``.
        ratio: synthetic images for each real one of a group; None: no ratio.
        count: synthetic images of each group; None with no ratio: all.
        per: the column whose values make groups.
        replace_probability: with which a real image is replaced by a synthetic one, in each epoch.
        soft_labels: give each row a vector of the probabilities of all classes.
        gamma: a sample of another class' source has its own class with strength to this power.
        soft_column: a column with such vectors; None: they are computed.
        source_label: the column with the class of the source; None: one of SOURCE_LABELS.
        held_out: sets whose images and near copies are left out.
        weight: of a synthetic image.
        allow_fewer: take what there is, where a group has fewer images than asked.
        seed: of the choice.
    """

    real: str
    synthetic: tuple[str, ...]
    ratio: float | None = None
    count: int | None = None
    per: str = LABEL
    replace_probability: float = 0.0
    soft_labels: bool = False
    gamma: float = 1.0
    soft_column: str | None = None
    source_label: str | None = None
    held_out: tuple[str, ...] = ()
    weight: float = 1.0
    allow_fewer: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise SpecError if a value is not allowed."""
        if not self.synthetic:
            raise SpecError("--synthetic", None, "a set, or OUTPUT:SELECTION")
        if self.ratio is not None and self.count is not None:
            raise SpecError("--ratio", self.ratio, "", because="--count is set too; use one")
        if self.ratio is not None and not (0 < self.ratio < math.inf):
            raise SpecError("--ratio", self.ratio, "a number above 0")
        if self.count is not None and self.count < 1:
            raise SpecError("--count", self.count, "1 or more")
        if not 0 <= self.replace_probability <= 1:
            raise SpecError("--replace-probability", self.replace_probability, "0 to 1")
        if not (0 < self.gamma < math.inf):
            raise SpecError("--gamma", self.gamma, "a number above 0")
        if not (0 < self.weight < math.inf):
            raise SpecError("--weight", self.weight, "a number above 0")
        if self.soft_column and not self.soft_labels:
            raise SpecError("--soft-label-column", self.soft_column, "with --soft-labels")


@dataclass(frozen=True)
class Source:
    """A set of the mix: its name in the manifest, the set, and the keys that are selected."""

    name: str
    images: ImageSet
    keys: frozenset[str] | None = None

    def rows(self, with_images: bool, more: Sequence[str] = ()) -> Iterator[SetRow]:
        known = [one for one in more if one in self.images.columns]
        for row in self.images.read(with_images, known):
            if self.keys is None or row.key in self.keys:
                yield row


@dataclass(frozen=True)
class MixRow:
    """One row of a training set.

    Attributes:
        source_key: the real image of its class that it was made from.
        group: the value of the column that makes groups.
        soft: probabilities of the classes.
        origins: the keys of images that it was made from, as its set says.
    """

    key: str
    label: str
    is_synthetic: bool
    set: str
    file: str
    row: int | None
    weight: float
    source_key: str | None
    group: str
    prompt: str | None = None
    soft: Mapping[str, float] | Sequence[float] | None = None
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A row that is not in the training set, and why."""

    key: str
    set: str
    reason: str
    message: str


@dataclass(frozen=True)
class Mixed:
    """A training set.

    Attributes:
        rows: the real ones first; synthetic ones in the order of the draw.
        classes: names of the classes, in the order of their numbers.
        left_out: rows that were refused, with their reasons.
        not_drawn: synthetic rows that the ratio or the count left out.
        short: group -> (drawn, asked), where there were fewer than asked.
        unread: held-out set -> images of it that cannot be read.
    """

    mix: Mix
    sources: tuple[Source, ...]
    rows: tuple[MixRow, ...]
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    not_drawn: int = 0
    short: dict[str, tuple[int, int]] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def by_source(self) -> bool:
        """Whether some real images are replaced by synthetic images that were made from them."""
        return any(row.source_key is not None for row in self.rows)

    @property
    def only_real(self) -> list[str]:
        """The classes without a synthetic image."""
        made = {row.label for row in self.rows if row.is_synthetic}
        return [name for name in self.classes if name not in made]

    def counts(self) -> dict[str, dict[str, int]]:
        """Set -> class -> number of rows."""
        found: dict[str, Counter[str]] = {one.name: Counter() for one in self.sources}
        for row in self.rows:
            found[row.set][row.label] += 1
        return {name: dict(sorted(one.items())) for name, one in found.items()}
