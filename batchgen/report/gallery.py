"""Picks images for the report and the contact sheet, from shards spread over the output."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.errors import BatchgenError
from batchgen.images.files import thumbnail
from batchgen.output.formats import format_of
from batchgen.output.ledger import DATA, Ledger
from batchgen.plain_text import short
from batchgen.plan.plan import Plan

IMAGES = 64
SHARDS = 8
THUMBNAIL_PX = 128
_UNREADABLE = (BatchgenError, OSError, ValueError, KeyError, TypeError, pa.ArrowException)


@dataclass(frozen=True)
class Shown:
    """One image on the page."""

    key: str
    prompt: str
    data: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.data).decode()


def shown_of(
    plan: Plan, ledger: Ledger, committed: list[int], unreadable: list[str]
) -> Iterator[Shown]:
    """Yields images from shards spread over the output, reading as little as possible.

    If images of a shard cannot be read or decoded, the rest of that shard is left out and its
    data file is added to ``unreadable``.
    """
    if not committed:
        return
    step = max(1, len(committed) // SHARDS)
    shards = committed[::step][:SHARDS]
    per_shard = -(-IMAGES // len(shards))
    for marker in ledger.markers(shards):
        names = [file.name for file in marker.files if file.name.startswith(f"{DATA}/")]
        damaged_name = names[0] if names else ""
        try:
            for row in format_of(plan).peek(ledger.store, names, per_shard):
                damaged_name = next((name for name in names if row["key"] in name), names[0])
                yield _thumb(row)
        except _UNREADABLE:
            unreadable.append(damaged_name)


def _thumb(row: dict[str, Any]) -> Shown:
    label = row["label"]
    caption = row["prompt"] or ("" if label is None else str(label))
    return Shown(short(row["key"]), short(caption), thumbnail(row["image"], THUMBNAIL_PX))
