"""Filters: which images are rejected, by their scores and the policy of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_SAFE = "not-safe"


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
    Filter(
        "blank-image",
        "reject_blank",
        lambda is_on, scores: is_on and scores["is_blank"],
        "no channel varies by more than the limit of the scorer quality (blank_below)",
    ),
    Filter(
        "dark-image",
        "reject_dark",
        lambda is_on, scores: is_on and scores["is_dark"],
        "99 of 100 pixels are darker than the limit of the scorer quality (dark_below)",
    ),
    Filter(
        "blurred-image",
        "reject_blurred",
        lambda is_on, scores: is_on and scores["is_blurred"],
        "its sharpness is below the limit of the scorer quality (blurred_below)",
    ),
    Filter(
        NOT_SAFE,
        "nsfw",
        lambda how, scores: how == "reject" and scores["is_unsafe"],
        "its nsfw_probability is at or above the limit of the scorer nsfw (above)",
    ),
)

# What filters and marks read; only the scorers that they are made for may fill it.
READ = ("is_flat", "is_blank", "is_dark", "is_blurred", "is_unsafe", "objects_failed")
