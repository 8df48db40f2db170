"""Finds the images that must not be in a training set, as they show what is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq

from batchgen.curate.copies import DISTANCE, LIKENESS
from batchgen.curate.image_sets import set_at
from batchgen.curate.mix_set import LeftOut, Mix, MixRow, Source
from batchgen.curate.near import NearImages, nearest_of
from batchgen.curate.prints import Picture, Prints, prints_of
from batchgen.curate.score_sets import score_sets
from batchgen.errors import InputError
from batchgen.output.score_set import KEY
from batchgen.spec.splits import is_held_out

LEAK = "near-copy-of-held-out"
_FOUND = ["is_leak", "leak"]  # columns of `batchgen copies --against`

Say = Callable[[str], None]


def known_leaks(source: Source) -> dict[str, str]:
    """Samples that `batchgen copies` found to be leaks, in any of its score sets -> the original.

    Raises:
        InputError: such a score set lacks shards of the output.
    """
    ledger = source.images.ledger
    if ledger is None:
        return {}
    found: dict[str, str] = {}
    for one in score_sets(ledger):
        names = {column.name for column in one.record.columns}
        if one.record.scorers or not names.issuperset(_FOUND):
            continue
        if not one.complete:
            url = ledger.store.url
            raise InputError(
                f"{url}: the score set {one.name!r} of copies has {one.done:,} of {one.shards:,} "
                "shards, so it does not say which of the others are leaks; repeat "
                f"`batchgen copies {url} --name {one.name}` with its sets"
            )
        for name in one.files:
            with ledger.store.open(name) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                table = parquet.read([KEY, *_FOUND], use_threads=False)
            leaks = table.filter(table.column("is_leak")).select([KEY, "leak"]).to_pydict()
            found |= dict(zip(leaks[KEY], leaks["leak"], strict=True))
    return found


def without_leaks(
    mix: Mix,
    sources: Sequence[Source],
    ours: list[MixRow],
    others: list[MixRow],
    left_out: list[LeftOut],
    say: Say,
) -> tuple[list[MixRow], list[MixRow]]:
    """The rows that are no near copies of held-out images."""
    rows = [*ours, *others]
    for place in mix.held_out:
        say(f"reading the images of {place}")
        held_out = _held_out_prints(place)
        for source in sources:
            say(f"reading the images of {source.images.place}")
            wanted = {row.key for row in rows if row.set == source.name}
            found = _copies_of(held_out, source, wanted)
            left_out += [
                LeftOut(key, source.name, LEAK, f"of {original} in {place}")
                for key, original in sorted(found.items())
            ]
            rows = [row for row in rows if row.set != source.name or row.key not in found]
    kept = [row for row in rows if not row.is_synthetic]
    if not kept:
        raise InputError("no row of the real set is left; all are copies of held-out images")
    return kept, [row for row in rows if row.is_synthetic]


def _held_out_prints(place: str) -> Prints:
    images = set_at(place)
    splits = images.has_splits and any(is_held_out(row.split) for row in images.read(False, ()))
    return prints_of(
        (
            Picture(row.key, row.image)
            for row in images.read(True, ())
            if not splits or is_held_out(row.split)
        ),
        place,
    )


def _copies_of(held_out: Prints, source: Source, wanted: set[str]) -> dict[str, str]:
    """Key -> held-out key of the near copies in a set."""
    if not wanted:
        return {}
    pictures = (Picture(row.key, row.image) for row in source.rows(True) if row.key in wanted)
    prints = prints_of(pictures, source.images.place, 0.0)
    near = NearImages(held_out, prints, DISTANCE, LIKENESS)
    every = np.arange(len(prints))
    found = nearest_of(near, np.arange(len(held_out)), every, len(prints))
    return {
        prints.keys[at]: held_out.keys[place]
        for at, place in enumerate(found.place.tolist())
        if place >= 0
    }
