"""Tells which images the samples of a mix were made from: by columns, and by their keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from batchgen.curate.mix_set import MixRow, Source
from batchgen.storage import is_within

_COLUMNS = re.compile(r"source_id|(image|source|init|reference)_key")
_ROW_KEY = "row_key"  # a recipe's rows; of their images, if the task reads images


def origin_columns(source: Source) -> list[str]:
    """The columns that have the key of the image that a sample was made from.

    An output whose runs read no images has such columns as well, with the keys of its prompts.
    """
    if source.images.ledger is not None and not reads_images(source):
        return []
    by_row = [] if source.images.ledger is None else [_ROW_KEY]
    names = source.images.columns
    return [name for name in names if _COLUMNS.fullmatch(name) or name in by_row]


def reads_images(source: Source) -> bool:
    """Whether the set is an output, and one of its runs read images."""
    ledger = source.images.ledger
    return ledger is not None and any(plan.spec.image_parts for plan in ledger.parts())


def origins_of(source: Source, row: MixRow) -> tuple[str, ...]:
    """The keys of images that a sample may be made from.

    The samples of row K have the keys K-v0, K-v1, .... A set that is no output does not say how it
    was made, so its keys count as well.
    """
    stem, dash, _ = row.key.rpartition("-v")
    by_key = dash and (source.images.ledger is None or reads_images(source))
    return (*row.origins, *([stem] if by_key else []))


def with_sources(
    real: Source, synthetic: Sequence[Source], ours: Iterable[MixRow], others: Iterable[MixRow]
) -> list[MixRow]:
    """The synthetic rows, each with the key of the real image of its class that it was made from.

    A key K-v0 counts only in an output whose run read the real set itself.
    """
    labels = {row.key: row.label for row in ours}
    sets = {one.name: (one, _reads(one, real)) for one in synthetic}

    def made_from(row: MixRow) -> Iterator[str]:
        source, by_key = sets[row.set]
        for key in origins_of(source, row) if by_key else row.origins:
            if labels.get(key) == row.label:
                yield key

    return [replace(row, source_key=next(made_from(row), None)) for row in others]


def _reads(source: Source, real: Source) -> bool:
    """Whether a run of the output read images of the real set."""
    ledger, place = source.images.ledger, real.images.place
    return ledger is not None and any(
        plan.spec.image_parts
        and (is_within(plan.spec.input.path, place) or is_within(place, plan.spec.input.path))
        for plan in ledger.parts()
        if plan.spec.input.path
    )
