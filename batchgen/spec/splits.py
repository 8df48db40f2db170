"""The names of splits, train, validation and test, and which of them are held out."""

from __future__ import annotations

from collections.abc import Iterable

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = (VALIDATION, TEST)
_WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
SPLITS = {word: split for split, words in _WORDS.items() for word in words}
OTHER_SPLIT = "other-split"  # of reasons.REASONS


def split_named(word: object) -> str | None:
    """The split that a name means, such as ``val``; None for any other name, or a number."""
    return SPLITS.get(word.lower()) if isinstance(word, str) else None


def is_held_out(split: str | None) -> bool:
    """Whether a split is kept for evaluation: its name means validation or test."""
    return split is not None and split_named(split) in HELD_OUT


def is_wanted(split: str | None, wanted: Iterable[str]) -> bool:
    """Whether a row's split is one of those; ``val`` and ``validation`` are the same."""
    return split is not None and (split_named(split) or split) in {
        split_named(one) or one for one in wanted
    }
