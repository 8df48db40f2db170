"""The columns of a score set about copies: which image each sample is a copy of, and how near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen.curate.near import Nearest, nothing
from batchgen.curate.prints import Prints
from batchgen.images.perceptual_hash import BITS
from batchgen.stages.scorers.scorer import ScoreColumn

Array = np.ndarray[Any, Any]

ABOUT = {
    "leak": "held-out image",
    "memorised": "training image",
    "source_copy": "source image of the run",
}


@dataclass(frozen=True)
class OtherSet:
    """A set to compare with: its images, and what a copy of one of them is called."""

    kind: str
    place: str
    prints: Prints
    left_out: int
    flipped: Prints | None


Column = tuple[ScoreColumn, pa.Array]


def own_columns(prints: Prints, stays: Array, found: Nearest) -> list[Column]:
    """The columns about copies in the output."""
    keys = np.array(prints.keys, object)
    is_copy = found.place >= 0
    originals = np.unique(found.place[is_copy])
    copy_of = np.full(len(keys), None, object)
    copy_of[is_copy] = keys[found.place[is_copy]]
    groups = copy_of.copy()
    groups[originals] = keys[originals]
    return [
        (
            ScoreColumn("is_copy", pa.bool_(), "whether it is a near copy of a sample that stays"),
            pa.array(is_copy),
        ),
        (
            ScoreColumn("copy_of", pa.string(), "the nearest sample that stays"),
            pa.array(copy_of, pa.string()),
        ),
        (
            ScoreColumn(
                "copies_group", pa.string(), "the sample that stays, for it and its copies"
            ),
            pa.array(groups, pa.string()),
        ),
        *_measured("copies", "the sample that stays", found),
    ]


def _measured(kind: str, what: str, found: Nearest) -> list[Column]:
    missing = found.place < 0
    distance = f"bits of 64 in which its hash differs from that of {what}"
    alike = f"how alike it and {what} are, 1 is equal"
    return [
        (
            ScoreColumn(f"{kind}_distance", pa.int32(), distance),
            pa.array(found.bits.astype(np.int32), pa.int32(), mask=missing | (found.bits > BITS)),
        ),
        (
            ScoreColumn(f"{kind}_likeness", pa.float32(), alike),
            pa.array(found.likeness, pa.float32(), mask=missing),
        ),
    ]


def other_columns(
    kind: str, prints: Prints, sets: list[OtherSet], matches: list[Nearest]
) -> list[Column]:
    """The columns about copies of images of other sets: the most alike one of all sets."""
    size = len(prints)
    best = nothing(size)
    keys, places = np.full(size, None, object), np.full(size, None, object)
    for one, match in zip(sets, matches, strict=True):
        nearer = match.likeness > best.likeness
        names = np.array(one.prints.keys, object)
        keys[nearer], places[nearer] = names[match.place[nearer]], one.place
        for name in ("place", "bits", "likeness"):
            getattr(best, name)[nearer] = getattr(match, name)[nearer]
    about, is_kind = ABOUT[kind], "is_memorised" if kind == "memorised" else f"is_{kind}"
    columns = [
        (
            ScoreColumn(is_kind, pa.bool_(), f"whether it is a near copy of a {about}"),
            pa.array(best.place >= 0),
        ),
        (
            ScoreColumn(kind, pa.string(), f"key of the nearest {about}"),
            pa.array(keys, pa.string()),
        ),
        (
            ScoreColumn(f"{kind}_set", pa.string(), f"the set of that {about}"),
            pa.array(places, pa.string()),
        ),
    ]
    return [*columns, *_measured(kind, f"that {about}", best)]
