"""Scorers by an image classifier: agreement with the label, and whether an image is unsafe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchgen.stages.scorers.scorer import Array, ScoreColumn, Scored, Scores
from batchgen.stages.scorers.text_match import margin

Logits = Callable[[Sequence[object]], list[Array]]


@dataclass(frozen=True)
class ClassAgreement:
    """How sure a classifier is of the label's class.

    Attributes:
        logits: images -> logits (C,).
        names: the classifier's classes.
        classes: value of the label, as text -> number of its class in the classifier.
        fingerprint: of the model and its settings.
        reads: the column of the labels.
    """

    logits: Logits
    names: tuple[str, ...]
    classes: Mapping[str, int]
    fingerprint: str
    reads: tuple[str, ...] = ("label",)
    compares: bool = False
    columns: tuple[ScoreColumn, ...] = (
        ScoreColumn("predicted_label", pa.string(), "most probable class of the classifier"),
        ScoreColumn("class_agrees", pa.bool_(), "whether that is the label's class"),
        ScoreColumn("class_probability", pa.float32(), "probability of the label's class"),
        ScoreColumn(
            "class_margin",
            pa.float32(),
            "probability of the label's class less that of the most probable other one",
        ),
        ScoreColumn("class_entropy", pa.float32(), "entropy of the classes in nats; 0: sure"),
    )

    def __call__(self, images: Scored) -> Scores:
        table = [probabilities(one) for one in self.logits(images.pixels)]
        labels = images.rows[self.reads[0]]
        own = [None if label is None else self.classes[str(label)] for label in labels]
        best = [int(np.argmax(one)) for one in table]
        both = list(zip(table, own, strict=True))
        return {
            "predicted_label": [self.names[one] for one in best],
            "class_agrees": [
                None if mine is None else mine == one for mine, one in zip(own, best, strict=True)
            ],
            "class_probability": [
                None if mine is None else float(np.float32(one[mine])) for one, mine in both
            ],
            "class_margin": [margin(list(one), mine) for one, mine in both],
            "class_entropy": [_entropy(one) for one in table],
        }


@dataclass(frozen=True)
class Unsafe:
    """The probability that an image is not safe for work.

    Attributes:
        unsafe: images -> the probability.
        above: from this probability on an image is unsafe.
        fingerprint: of the model and its settings.
    """

    unsafe: Callable[[Sequence[object]], list[float]]
    above: float
    fingerprint: str
    reads: tuple[str, ...] = ()
    compares: bool = False

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        return (
            ScoreColumn("nsfw_probability", pa.float32(), "probability of not safe for work"),
            ScoreColumn("is_unsafe", pa.bool_(), f"that probability is at least {self.above:g}"),
        )

    def __call__(self, images: Scored) -> Scores:
        found = [float(np.float32(one)) for one in self.unsafe(images.pixels)]
        return {"nsfw_probability": found, "is_unsafe": [one >= self.above for one in found]}


def probabilities(logits: Array) -> Array:
    """Softmax of the logits of one image, in float64."""
    raised = np.exp(logits.astype(np.float64) - logits.max())
    found: Array = raised / raised.sum()
    return found


def _entropy(shares: Array) -> float:
    kept = shares[shares > 0]
    return float(np.float32(max(0.0, -(kept * np.log(kept)).sum())))
