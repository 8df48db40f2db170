"""The kinds of sources by name, and which one a source looks like."""

from __future__ import annotations

from batchgen.errors import InputError, nearest
from batchgen.importing.kinds import (
    coco,
    csv_rows,
    image_folder,
    json_lines,
    parquet,
    text,
    voc,
    webdataset,
    yolo,
)
from batchgen.importing.kinds.hub import HUB
from batchgen.importing.listing import Listing
from batchgen.importing.rows import Kind

# Kind by name. The first one that fits a source is taken, so the special ones come first.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        csv_rows.KIND,
        json_lines.KIND,
        text.KIND,
        webdataset.KIND,
        parquet.KIND,
        coco.KIND,
        voc.KIND,
        yolo.KIND,
        image_folder.KIND,
        text.CLASSES,
        HUB,
    )
}


def kind_named(name: str) -> Kind:
    """The kind of this name.

    Raises:
        InputError: there is none.
    """
    if name not in KINDS:
        raise InputError(f"--kind is {name!r}; allowed: {', '.join(KINDS)}{nearest(name, KINDS)}")
    return KINDS[name]


def kind_of(listing: Listing) -> Kind | None:
    """The first kind that a source looks like; None if there is none."""
    return next((kind for kind in KINDS.values() if kind.fits(listing)), None)


def about_kinds() -> str:
    """All kinds, for messages."""
    return "; ".join(f"{kind.name} ({kind.about})" for kind in KINDS.values())
