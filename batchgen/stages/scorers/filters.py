"""Filters: which images are rejected, by their scores and the policy of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Filter:
    """Rejects an image for one reason.

    Attributes:
        reason: one of ``reasons.REASONS``.
        policy: the field of the section ``policy`` that decides.
        refuses: is given that field's value and the image's scores by name.
        message: what is wrong with the image.
    """

    reason: str
    policy: str
    refuses: Callable[[Any, Mapping[str, Any]], bool]
    message: str


FILTERS = (
    Filter(
        "flat-image",
        "reject_flat",
        lambda is_on, scores: is_on and scores["is_flat"],
        "every pixel has the same colour",
    ),
)
