"""What the small CLIP reads: captions, each with the attributes that it names, and false ones."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from jobs.small_model.captions import (
    DIGIT_TEMPLATES,
    DIGIT_WORDS,
    SHAPE_TEMPLATES,
    digit_caption,
    shape_caption,
    with_article,
)
from jobs.small_model.data import COLOUR_NAMES, SHAPES, SIZES

CLASSES: Final = (*DIGIT_WORDS, *SHAPES)
UNSAID: Final = -1
PLAIN_SHARE: Final = 0.4  # of the captions: only the class, as zero-shot classification asks
# What a person writes who wants a class told from others.
PLAIN_DIGITS: Final = (
    "{word}",
    "{numeral}",
    "{a_word}",
    "the digit {word}",
    "the digit {numeral}",
    "a picture of {a_word}",
    "a photo of {a_word}",
    "a photo of the digit {numeral}",
    "the number {word}",
)
PLAIN_SHAPES: Final = (
    "{word}",
    "{a_word}",
    "a picture of {a_word}",
    "a photo of {a_word}",
    "{a_word} on a background",
    "the shape of {a_word}",
)
# Where a caption of a shape leaves the background out.
WITHOUT_BACKGROUND: Final = len(SHAPE_TEMPLATES) - 1


class Caption(NamedTuple):
    """A text and what it says: class, colour, colour of the background, size; UNSAID if nothing."""

    text: str
    kind: int
    front: int = UNSAID
    back: int = UNSAID
    size: int = UNSAID

    @property
    def said(self) -> tuple[int, int, int, int]:
        return self.kind, self.front, self.back, self.size


def attributes(digits: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    """What pictures show, (N, 4) int64, from labels of digits (D, 1) and of shapes (S, 4)."""
    plain = torch.cat((digits, torch.full((len(digits), 3), UNSAID)), 1)  # (D, 4)
    drawn = shapes.clone()
    drawn[:, 0] += len(DIGIT_WORDS)
    return torch.cat((plain, drawn))


def caption_of(shown: list[int], generator: torch.Generator) -> Caption:
    """A caption that is true of a picture: a training caption, or only its class."""
    kind, front, back, size = shown
    plain = bool(torch.rand((), generator=generator) < PLAIN_SHARE)
    if plain:
        return plain_caption(kind, _pick(len(_plain(kind)), generator))
    if kind < len(DIGIT_WORDS):
        return Caption(digit_caption(kind, _pick(len(DIGIT_TEMPLATES), generator)), kind)
    sized = bool(torch.rand((), generator=generator) < 0.5) and SIZES[size] != ""
    template = _pick(len(SHAPE_TEMPLATES), generator)
    return drawn_caption(kind, front, back, size if sized else UNSAID, template)


def plain_caption(kind: int, template: int) -> Caption:
    """A caption that names the class alone."""
    word = CLASSES[kind]
    text = _plain(kind)[template].format(word=word, a_word=with_article(word), numeral=kind)
    return Caption(text, kind)


def drawn_caption(kind: int, front: int, back: int, size: int, template: int) -> Caption:
    """A training caption of a shape; ``size`` may be UNSAID."""
    text = shape_caption(
        CLASSES[kind],
        COLOUR_NAMES[front],
        COLOUR_NAMES[back],
        "" if size == UNSAID else SIZES[size],
        template,
    )
    return Caption(text, kind, front, UNSAID if template == WITHOUT_BACKGROUND else back, size)


def false_caption(shown: list[int], generator: torch.Generator) -> Caption:
    """A training caption that is wrong in one attribute: what is hardest to tell."""
    kind, front, back, _ = shown
    if kind < len(DIGIT_WORDS):
        other = (kind + 1 + _pick(len(DIGIT_WORDS) - 1, generator)) % len(DIGIT_WORDS)
        return Caption(digit_caption(other, _pick(len(DIGIT_TEMPLATES), generator)), other)
    template = _pick(WITHOUT_BACKGROUND, generator)
    wrong = _pick(3, generator)
    if wrong == 0:
        shape = kind - len(DIGIT_WORDS)
        kind = len(DIGIT_WORDS) + (shape + 1 + _pick(len(SHAPES) - 1, generator)) % len(SHAPES)
    elif wrong == 1:
        front = _other_colour(front, back, generator)
    else:
        back = _other_colour(back, front, generator)
    return drawn_caption(kind, front, back, UNSAID, template)


def agreement(captions: list[Caption], shown: torch.Tensor) -> torch.Tensor:
    """Which captions are true of which pictures: (T, N) bool for ``shown`` (N, 4)."""
    said = torch.tensor([caption.said for caption in captions])[:, None]  # (T, 1, 4)
    return ((said == UNSAID) | (said == shown[None])).all(2)


def _plain(kind: int) -> tuple[str, ...]:
    return PLAIN_DIGITS if kind < len(DIGIT_WORDS) else PLAIN_SHAPES


def _other_colour(colour: int, taken: int, generator: torch.Generator) -> int:
    """A colour other than both."""
    allowed = [one for one in range(len(COLOUR_NAMES)) if one not in (colour, taken)]
    return allowed[_pick(len(allowed), generator)]


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
