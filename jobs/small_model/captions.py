"""What the training captions say: several ways to name each digit and each drawn shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from jobs.small_model.data import COLOUR_NAMES, SHAPES, SIZES

DIGIT_WORDS: Final = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
DIGIT_TEMPLATES: Final = (
    "a handwritten digit {word}",
    "the handwritten digit {numeral}",
    "a handwritten {word}",
    "a handwritten {numeral}",
    "handwritten digit {numeral}",
    "the digit {word}, handwritten",
)
# The first is the one to recommend, so it is drawn more often.
SHAPE_TEMPLATES: Final = (
    "{front_shape} on {back} background",
    "{front_shape} on {back} background",
    "{front_shape} on {back} background",
    "{bare_shape}, {bare_back} background",
    "{bare_shape} on {bare_back}",
    "{back} background with {front_shape}",
    "a picture of {front_shape} on {back} background",
    "{front_shape}",
)


def digit_caption(digit: int, template: int = 0) -> str:
    """The caption of one handwritten digit, e.g. ``a handwritten digit seven``."""
    return DIGIT_TEMPLATES[template].format(word=DIGIT_WORDS[digit], numeral=digit)


def shape_caption(shape: str, front: str, back: str, size: str = "", template: int = 0) -> str:
    """The caption of one drawn shape, e.g. ``a red circle on a blue background``."""
    bare_shape = f"{size} {front} {shape}".strip()
    return SHAPE_TEMPLATES[template].format(
        front_shape=with_article(bare_shape),
        bare_shape=bare_shape,
        back=with_article(back),
        bare_back=back,
    )


def with_article(words: str) -> str:
    """``words`` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def digit_captions(labels: torch.Tensor, generator: torch.Generator) -> list[str]:
    """A random caption for each row of digit ``labels`` (N, 1) int64."""
    picks = torch.randint(len(DIGIT_TEMPLATES), (len(labels),), generator=generator)  # (N,)
    return [
        digit_caption(digit, template)
        for (digit,), template in zip(labels.tolist(), picks.tolist(), strict=True)
    ]


def shape_captions(labels: torch.Tensor, generator: torch.Generator) -> list[str]:
    """A random caption for each row of shape ``labels`` (N, 4) int64; half name the size."""
    picks = torch.randint(len(SHAPE_TEMPLATES), (len(labels),), generator=generator)  # (N,)
    sized = torch.rand(len(labels), generator=generator) < 0.5  # (N,)
    return [
        shape_caption(
            SHAPES[shape],
            COLOUR_NAMES[front],
            COLOUR_NAMES[back],
            SIZES[size] if with_size else "",
            template,
        )
        for (shape, front, back, size), template, with_size in zip(
            labels.tolist(), picks.tolist(), sized.tolist(), strict=True
        )
    ]


def every_caption() -> Sequence[str]:
    """All captions the training can meet, in a fixed order: what the tokenizer is fitted to."""
    digits = [digit_caption(d, t) for d in range(10) for t in range(len(DIGIT_TEMPLATES))]
    shapes = [
        shape_caption(shape, front, back, size, template)
        for template in range(len(SHAPE_TEMPLATES))
        for shape in SHAPES
        for front in COLOUR_NAMES
        for back in COLOUR_NAMES
        for size in SIZES
        if front != back
    ]
    return digits * 100 + shapes
