"""Decides whether the labels of a source image can be true of the image made from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

KEPT = "kept"  # the objects are where they were
REQUESTED = "requested"  # the model was asked to put them there
REPAINTED = "repainted"  # inpainting has changed some of them
VOID = "void"  # nothing is known; no objects are written


class Rules(Protocol):
    """The rules of a job, as the section ``labels`` of its spec has them."""

    @property
    def are(self) -> str:
        """``auto``, or what the labels are."""

    @property
    def max_strength(self) -> float:
        """Image-to-image keeps labels up to this strength."""

    @property
    def min_visibility(self) -> float:
        """Objects of which a smaller share is left after cropping are dropped."""

    @property
    def max_repainted(self) -> float:
        """Inpainting keeps objects of which at most this share is repainted."""

    @property
    def ignored_class(self) -> int:
        """The class of pixels without a label."""


_KEEPING = ("super-resolution", "image-edit")


def truth_of(
    rules: Rules, task: str, strength: float | None, parts: Collection[str], made: bool
) -> str:
    """What the labels of a sample are: KEPT, REQUESTED, REPAINTED or VOID.

    Args:
        rules: their field ``are`` overrides what the task says.
        task: its name.
        strength: of image-to-image; None without a source image.
        parts: the parts of a row that condition the model, such as ``image`` and ``control``.
        made: whether a condition was drawn from the labels themselves.
    """
    if rules.are != "auto":
        return rules.are
    if task == "inpainting":
        return REPAINTED
    if task in _KEEPING:
        return KEPT
    if task == "image-to-image":
        return KEPT if (strength or 0.0) <= rules.max_strength else VOID
    if task == "control":
        if made or "regions" in parts:
            return REQUESTED
        return KEPT if any(part.startswith("control") for part in parts) else VOID
    return VOID
