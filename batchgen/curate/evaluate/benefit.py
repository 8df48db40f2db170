"""Measures whether synthetic images help a classifier: every arm, every K, every draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchgen.curate.evaluate.checks import Sets
from batchgen.curate.evaluate.classifiers import (
    CHOICES,
    USUAL,
    Part,
    cnn_accuracies,
    logistic_accuracies,
    moved_copies,
)
from batchgen.curate.evaluate.protocol import ARMS, Protocol
from batchgen.curate.evaluate.sets import ImageSet

Array = np.ndarray[Any, Any]
Tell = Callable[[str, int, int], None]

COPIES = 4  # moved copies of each real image, for a classifier on features
_CHOOSING = 3  # draws by which validation chooses
Features = dict[str, Array]  # name of a set -> its features, and those of moved copies


@dataclass(frozen=True)
class Trained:
    """The accuracy of one classifier on the held-out images.

    Attributes:
        classifier: its name.
        per_class: K; 0 for the pool.
        arm: of ARMS.
        draw: number of the draw.
        accuracy: fraction of the held-out images that it names right.
    """

    classifier: str
    per_class: int
    arm: str
    draw: int
    accuracy: float


@dataclass(frozen=True)
class Bench:
    """All that classifiers are trained on and tested with.

    Attributes:
        sets: the images, and ``held_out``.
        protocol: how they are trained.
        features: of each set by its name, if a classifier reads them; ``moved`` is that of moved
            copies of the real images, (n * COPIES, d).
    """

    sets: Sets
    protocol: Protocol
    features: Features

    def drawn(self, count: int, draw: int) -> Array:
        """The places of ``count`` real images of each class."""
        rng = np.random.default_rng(self.protocol.seed_of("draw", count, draw))
        labels = np.array(self.sets.real.labels)
        return np.sort(
            np.concatenate(
                [
                    rng.choice(np.flatnonzero(labels == one), count, replace=False)
                    for one in self.sets.classes
                ]
            )
        )

    def classes_of(self, images: ImageSet) -> Array:
        """The number of each image's class."""
        return np.searchsorted(self.sets.classes, np.array(images.labels)).astype(np.int64)

    def part(self, images: ImageSet, classifier: str) -> Part:
        """All images of a set, as the classifier reads them."""
        data = images.small if classifier == "cnn" else self.features[images.name]
        return Part(data, self.classes_of(images))

    def parts(self, arm: str, classifier: str, places: Array, draw: int) -> list[Part]:
        """What an arm learns from."""
        real = _taken(self.part(self.sets.real, classifier), places)
        synthetic = self.part(self.sets.synthetic, classifier)
        if arm == "synthetic":
            return [synthetic]
        if arm == "real+shuffled":
            rng = np.random.default_rng(self.protocol.seed_of("shuffle", draw))
            return [real, replace(synthetic, classes=rng.permutation(synthetic.classes))]
        if arm.endswith("+geometric"):
            real = self._moved(real, places, classifier)
        if arm == "both+geometric":
            return [real, replace(synthetic, moved=classifier == "cnn")]
        return [real, synthetic] if arm == "real+synthetic" else [real]

    def _moved(self, real: Part, places: Array, classifier: str) -> Part:
        if classifier == "cnn":
            return replace(real, moved=True)
        copies = (places[:, None] * COPIES + np.arange(COPIES)).ravel()
        found = np.concatenate([real.images, self.features["moved"][copies]])
        return Part(found, np.concatenate([real.classes, np.repeat(real.classes, COPIES)]))

    def train(
        self, classifier: str, parts: Sequence[Part], tests: Sequence[Part], choice: float, at: int
    ) -> list[float]:
        """Train one classifier; returns its accuracy on each test set."""
        count = len(self.sets.classes)
        if classifier == "cnn":
            return cnn_accuracies(parts, tests, count, choice, at, self.protocol.steps)
        return logistic_accuracies(parts, tests, count, choice, at)


def _taken(part: Part, places: Array) -> Part:
    return Part(part.images[places], part.classes[places])


def measure(bench: Bench, tell: Tell) -> tuple[list[Trained], dict[str, dict[str, float]]]:
    """Train every classifier of the protocol.

    Args:
        tell: called with what is done, the number done and the number in all.

    Returns:
        The accuracies, and classifier -> K -> the hyper-parameter that was used.
    """
    protocol = bench.protocol
    chosen = {name: _choices(bench, name) for name in protocol.classifiers}
    jobs = list(_jobs(bench))
    found = []
    for number, (classifier, count, arm, draw) in enumerate(jobs):
        tell(f"{classifier}, {count or 'all'} per class, {arm}", number, len(jobs))
        choice = chosen[classifier][str(count or max(protocol.per_class))]
        found.append(_trained(bench, classifier, count, arm, draw, choice))
    tell("trained", len(jobs), len(jobs))
    return found, chosen


def _jobs(bench: Bench) -> Iterator[tuple[str, int, str, int]]:
    for classifier in bench.protocol.classifiers:
        for draw in range(bench.protocol.draws):
            for count in bench.protocol.per_class:
                for arm in ARMS:
                    if arm not in ("pool", "synthetic"):
                        yield classifier, count, arm, draw
            for arm in ("synthetic", "pool"):  # no real images are drawn for them
                if arm != "pool" or bench.sets.pool is not None:
                    yield classifier, 0, arm, draw


def _trained(
    bench: Bench, classifier: str, count: int, arm: str, draw: int, choice: float
) -> Trained:
    assert bench.sets.held_out is not None
    if arm == "pool":
        assert bench.sets.pool is not None
        parts = [bench.part(bench.sets.pool, classifier)]
    else:
        places = bench.drawn(count or min(bench.protocol.per_class), draw)
        parts = bench.parts(arm, classifier, places, draw)
    seed = bench.protocol.seed_of("train", count, draw)  # the same for all arms
    test = bench.part(bench.sets.held_out, classifier)
    (accuracy,) = bench.train(classifier, parts, [test], choice, seed)
    return Trained(classifier, count, arm, draw, accuracy)


def _choices(bench: Bench, classifier: str) -> dict[str, float]:
    """K -> the hyper-parameter: the best on validation with real images only, or the usual one."""
    validation = bench.sets.validation
    counts = bench.protocol.per_class
    if validation is None:
        return {str(count): USUAL[classifier] for count in counts}
    test = bench.part(validation, classifier)
    found = {}
    for count in counts:
        means = []
        for choice in CHOICES[classifier]:
            accuracies = []
            for draw in range(min(_CHOOSING, bench.protocol.draws)):
                parts = bench.parts("real", classifier, bench.drawn(count, draw), draw)
                seed = bench.protocol.seed_of("train", count, draw)
                accuracies += bench.train(classifier, parts, [test], choice, seed)
            means.append(float(np.mean(accuracies)))
        found[str(count)] = CHOICES[classifier][int(np.argmax(means))]
    return found


def moved_images(bench: Bench) -> Iterator[list[Array]]:
    """Moved copies of each real image at its own size; copies are the same in every draw."""
    for number, pixels in enumerate(bench.sets.real.pixels()):
        yield moved_copies(pixels, COPIES, bench.protocol.seed_of("moved", number))
