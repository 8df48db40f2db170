"""Finds the images that must not be in a training set, as they show what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow.parquet as pq

from batchgen.curate.copies import DISTANCE, LIKENESS
from batchgen.curate.image_sets import ImageSet, set_at, sources_of
from batchgen.curate.mix_origins import origins_of
from batchgen.curate.mix_set import LeftOut, Mix, MixRow, Source
from batchgen.curate.near import NearImages, nearest_of
from batchgen.curate.prints import Picture, Prints, prints_of
from batchgen.curate.score_sets import score_sets
from batchgen.errors import InputError
from batchgen.output.finished import refuse_unfinished
from batchgen.output.score_set import KEY
from batchgen.spec.splits import is_held_out

LEAK, MADE_FROM = "near-copy-of-held-out", "made-from-held-out"
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


def refuse_pending(images: ImageSet) -> None:
    """Raise InputError if the set is an output that lacks shards."""
    if images.ledger is not None:
        refuse_unfinished(images.ledger, images.ledger.parts(), then="repeat `mix`")


def without_leaks(
    mix: Mix,
    sources: Sequence[Source],
    ours: list[MixRow],
    others: list[MixRow],
    left_out: list[LeftOut],
    say: Say,
) -> tuple[list[MixRow], list[MixRow], dict[str, int]]:
    """The rows that are no near copies of held-out images, and were not made from them.

    Returns:
        The real and the synthetic rows; held-out set -> images of it that cannot be read.
    """
    rows, unread = [*ours, *others], dict[str, int]()
    held_out_sets = [_held_out(place) for place in mix.held_out]
    for images, keys in held_out_sets:
        say(f"reading the images of {images.place}")
        held_out = _held_out_prints(images, keys)
        if held_out.unread:
            unread[images.place] = held_out.unread
            told = "; ".join(f"{key}: {message}" for key, message in held_out.examples)
            say(
                f"{held_out.unread:,} images of {images.place} cannot be read, so their copies "
                f"are not found: {told}"
            )
        for source in sources:
            say(f"reading the images of {source.images.place}")
            of_set = [row for row in rows if row.set == source.name]
            found = {
                key: LeftOut(key, source.name, LEAK, f"of {original} in {images.place}")
                for key, original in _copies_of(held_out, source, {row.key for row in of_set})
            }
            for row, original in _made_from(source, of_set, keys, held_out, say):
                text = f"from {original} in {images.place}"
                found.setdefault(row.key, LeftOut(row.key, source.name, MADE_FROM, text))
            left_out += [found[key] for key in sorted(found)]
            rows = [row for row in rows if row.set != source.name or row.key not in found]
    kept = [row for row in rows if not row.is_synthetic]
    if not kept:
        raise InputError("no row of the real set is left; all are copies of held-out images")
    return kept, [row for row in rows if row.is_synthetic], unread


def _held_out(place: str) -> tuple[ImageSet, frozenset[str]]:
    """A held-out set, and the keys of those rows of it that are held out."""
    images = set_at(place)
    refuse_pending(images)
    rows = list(images.read(False, ()))
    keys = frozenset(row.key for row in rows if is_held_out(row.split))
    return images, keys or frozenset(row.key for row in rows)


def _held_out_prints(images: ImageSet, keys: frozenset[str]) -> Prints:
    pictures = (Picture(row.key, row.image) for row in images.read(True, ()) if row.key in keys)
    return prints_of(pictures, images.place, option="")


def _made_from(
    source: Source, rows: Sequence[MixRow], keys: frozenset[str], held_out: Prints, say: Say
) -> Iterator[tuple[MixRow, str]]:
    """Synthetic rows that were made from held-out images: by their keys, or by their pixels."""
    rows = [row for row in rows if row.is_synthetic]
    origins = {row.key: origins_of(source, row) for row in rows}
    wanted = {one for found in origins.values() for one in found}
    copies = _held_out_inputs(source, wanted, held_out, say)
    for row in rows:
        for key in origins[row.key]:
            if key in keys or key in copies:
                yield row, copies.get(key, key)
                break


def _held_out_inputs(
    source: Source, wanted: set[str], held_out: Prints, say: Say
) -> dict[str, str]:
    """Keys of images that the runs of an output read, and that are held out -> the original."""
    ledger = source.images.ledger
    if ledger is None or not wanted:
        return {}
    if any(plan.spec.input.columns.image is None for plan in ledger.parts()):
        return {}
    found: dict[str, str] = {}
    try:
        for images in sources_of(ledger):
            say(f"reading the images of {images.place}")
            found |= dict(_copies_of(held_out, Source("input", images), wanted, 1.0))
    except (InputError, OSError) as error:
        say(f"the sources were compared with held-out images only by key: {error}")
    return found


def _copies_of(
    held_out: Prints, source: Source, wanted: set[str], bad_limit: float = 0.0
) -> Iterator[tuple[str, str]]:
    """Key and held-out key of the near copies in a set."""
    if not wanted:
        return
    pictures = (Picture(row.key, row.image) for row in source.rows(True) if row.key in wanted)
    prints = prints_of(pictures, source.images.place, bad_limit, option="")
    near = NearImages(held_out, prints, DISTANCE, LIKENESS)
    found = nearest_of(near, np.arange(len(held_out)), np.arange(len(prints)), len(prints))
    for at, place in enumerate(found.place.tolist()):
        if place >= 0:
            yield prints.keys[at], held_out.keys[place]
