"""Scorers by a CLIP: how well image and prompt agree, and which of the classes it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores

Features = Callable[[Sequence[object]], list[Array]]


@dataclass(frozen=True)
class PromptSimilarity:
    """Cosine of the angle between the features of image and prompt.

    Attributes:
        images: images -> features (d,), of length 1.
        texts: the same for texts.
        fingerprint: of the model and its settings.
        reads: the column of the texts.
    """

    images: Features
    texts: Features
    fingerprint: str
    reads: tuple[str, ...] = ("prompt",)
    compares: bool = False
    columns: tuple[ScoreColumn, ...] = (
        ScoreColumn("clip_similarity", pa.float32(), "similarity of image and prompt, -1 to 1"),
    )

    def __call__(self, images: Scored) -> Scores:
        seen = self.images(images.pixels)
        said = self.texts(
            ["" if text is None else str(text) for text in images.rows[self.reads[0]]]
        )
        pairs = zip(seen, said, strict=True)
        return {"clip_similarity": [_cosine(one, other) for one, other in pairs]}


@dataclass(frozen=True)
class ZeroShot:
    """Which class an image shows, by the similarity to a text for each class.

    Attributes:
        images, texts, fingerprint: as in ``PromptSimilarity``.
        classes: value of the label, as text -> name of its class.
        templates: texts with ``{label}``; a class has the mean of its features.
        reads: the column of the labels.
    """

    images: Features
    texts: Features
    fingerprint: str
    classes: Mapping[str, str]
    templates: tuple[str, ...]
    reads: tuple[str, ...] = ("label",)
    compares: bool = False
    columns: tuple[ScoreColumn, ...] = (
        ScoreColumn("zero_shot_label", pa.string(), "class with the most similar text"),
        ScoreColumn("zero_shot_agrees", pa.bool_(), "whether that is the label's class"),
        ScoreColumn(
            "zero_shot_margin",
            pa.float32(),
            "similarity to the label's class less that to the nearest other one",
        ),
    )

    @cached_property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(self.classes.values()))

    @cached_property
    def _features(self) -> list[Array]:
        """Of the texts of each class, in the order of ``_names``."""
        found = []
        for name in self._names:
            mean = np.mean(self.texts([one.replace("{label}", name) for one in self.templates]), 0)
            found.append(mean / np.linalg.norm(mean))
        return found

    def __call__(self, images: Scored) -> Scores:
        table = [
            [_cosine(one, other) for other in self._features] for one in self.images(images.pixels)
        ]
        best = [int(np.argmax(near)) for near in table]
        own = [self._number(label) for label in images.rows[self.reads[0]]]
        return {
            "zero_shot_label": [self._names[one] for one in best],
            "zero_shot_agrees": [
                None if mine is None else mine == one for mine, one in zip(own, best, strict=True)
            ],
            "zero_shot_margin": [margin(near, mine) for near, mine in zip(table, own, strict=True)],
        }

    def _number(self, label: object) -> int | None:
        return None if label is None else self._names.index(self.classes[str(label)])


def margin(values: Sequence[float], own: int | None) -> float | None:
    """The own class's value less the largest other one; None without an own class."""
    if own is None:
        return None
    others = [value for number, value in enumerate(values) if number != own]
    return float(np.float32(values[own] - max(others, default=0.0)))


def _cosine(one: Array, other: Array) -> float:
    """The product of two features of length 1, summed in one order on every machine."""
    return float(np.float32((one.astype(np.float64) * other.astype(np.float64)).sum()))
