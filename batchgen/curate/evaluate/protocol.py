"""The protocol of a measured benefit: arms, draws and the primary endpoint, declared beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from batchgen.curate.evaluate.classifiers import (
    BATCH,
    CHOICES,
    DEGREES,
    ITERATIONS,
    SHIFT,
    STEPS,
    USUAL,
    ZOOM,
    ClassifierName,
)
from batchgen.errors import SpecError

CLASSIFIERS: tuple[str, ...] = get_args(ClassifierName)
# Name of an arm -> what it learns from. The letters are those of the protocol.
ARMS = {
    "real": "A: the K real images of each class",
    "real+geometric": "B: the same, rotated, shifted and scaled anew in each batch",
    "real+synthetic": "E: the same, and all synthetic images (half of each batch)",
    "both+geometric": "as E, with the geometric augmentation of B for all images",
    "synthetic": "F: only the synthetic images",
    "real+shuffled": "H: as E, with the labels of the synthetic images shuffled (must not help)",
    "pool": "G: all images of the pool (the ceiling)",
}
# What is compared, for each K: an arm, and the one that it is compared with.
COMPARED = (
    ("real+synthetic", "real"),
    ("real+synthetic", "real+geometric"),
    ("both+geometric", "real+geometric"),
)
PRIMARY_ARM, PRIMARY_OPPONENT, PRIMARY_COUNT = "real+synthetic", "real+geometric", 5
MOST_DRAWS = 1000


@dataclass(frozen=True)
class Protocol:
    """How the benefit is measured.

    Attributes:
        per_class: numbers of real images of each class (K).
        draws: of the K images; each has its own seed for the classifier.
        classifiers: ``cnn``, ``logistic`` or both; the first is that of the primary endpoint.
        primary_count: K of the primary endpoint; default: 5, or the first of ``per_class``.
        side: pixels a side of the images that the network reads.
        steps: of the network's training.
        seed: of draws, training and intervals.
        generator_saw: what the generator was trained on, as the user states it.
    """

    per_class: tuple[int, ...] = (3, 5, 10)
    draws: int = 10
    classifiers: tuple[str, ...] = ("cnn",)
    primary_count: int | None = None
    side: int = 32
    steps: int = STEPS
    seed: int = 0
    generator_saw: str = ""

    @property
    def primary(self) -> tuple[str, int, str, str]:
        """Classifier, K, arm and opponent of the primary endpoint."""
        usual = PRIMARY_COUNT if PRIMARY_COUNT in self.per_class else self.per_class[0]
        count = usual if self.primary_count is None else self.primary_count
        return self.classifiers[0], count, PRIMARY_ARM, PRIMARY_OPPONENT

    @property
    def sentence(self) -> str:
        """The primary endpoint in one sentence."""
        classifier, count, arm, opponent = self.primary
        return (
            f"primary endpoint: accuracy of {arm} minus that of {opponent}, {count} real images "
            f"per class, classifier {classifier}, {self.draws} draws"
        )

    def seed_of(self, *facts: object) -> int:
        """A seed of 63 bits that depends on the protocol's and on these facts."""
        digest = hashlib.sha256(repr((self.seed, *facts)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def facts(self) -> dict[str, Any]:
        """All that the measurement depends on, for the record."""
        classifier, count, arm, opponent = self.primary
        return {
            **asdict(self),
            "primary": {
                "classifier": classifier,
                "per_class": count,
                "arm": arm,
                "against": opponent,
            },
            "arms": ARMS,
            "choices": {name: list(CHOICES[name]) for name in self.classifiers},
            "usual": {name: USUAL[name] for name in self.classifiers},
            "batch": BATCH,
            "iterations": ITERATIONS,
            "geometric": {"degrees": DEGREES, "shift": SHIFT, "zoom": ZOOM},
        }

    def check(self) -> None:
        """Raises SpecError if a value is not allowed."""
        if not self.per_class or min(self.per_class) < 1:
            raise SpecError("--per-class", list(self.per_class), "numbers of 1 or more")
        if len(set(self.per_class)) < len(self.per_class):
            raise SpecError("--per-class", list(self.per_class), "different numbers")
        if not 2 <= self.draws <= MOST_DRAWS:
            raise SpecError("--draws", self.draws, f"2 to {MOST_DRAWS}; intervals need several")
        for name in self.classifiers:
            if name not in CLASSIFIERS:
                raise SpecError("--classifier", name, ", ".join(CLASSIFIERS))
        if self.primary_count is not None and self.primary_count not in self.per_class:
            allowed = f"one of --per-class: {_listed(self.per_class)}"
            raise SpecError("--primary", self.primary_count, allowed)
        if not 8 <= self.side <= 256:
            raise SpecError("--side", self.side, "8 to 256 pixels")
        if self.steps < 1:
            raise SpecError("--steps", self.steps, "1 or more")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
