"""Finds held-out images among others: equal pixels, near copies, and the sources of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from batchgen.curate.copies import DISTANCE, LIKENESS
from batchgen.curate.evaluate.sets import ImageSet, Origin
from batchgen.curate.near import NearImages
from batchgen.curate.prints import Picture, Prints, prints_of
from batchgen.errors import InputError
from batchgen.plan.plan import Plan
from batchgen.recipes.sources import parquet_source
from batchgen.spec.splits import is_wanted

COMPARED = ("image", "control")  # parts of a row that are pictures; masks are none


def equal_pairs(one: ImageSet, kept: ImageSet) -> list[tuple[str, str]]:
    """Keys of the images of both sets with equal pixels."""
    by_pixels = dict(zip(kept.digests, kept.keys, strict=True))
    return [
        (key, by_pixels[digest])
        for key, digest in zip(one.keys, one.digests, strict=True)
        if digest in by_pixels
    ]


def near_pairs(one: Prints, kept: Prints) -> list[tuple[str, str]]:
    """Keys of the images of one set that are near copies of images of the other, one pair each.

    They are found as `batchgen copies` finds them: by hashes, confirmed by pixels.
    """
    near = NearImages(one, kept, DISTANCE, LIKENESS)
    found: dict[int, int] = {}
    for matches in near(np.arange(len(one)), np.arange(len(kept))):
        for first, second in zip(matches.first.tolist(), matches.second.tolist(), strict=True):
            found.setdefault(first, second)
    return [(one.keys[first], kept.keys[second]) for first, second in sorted(found.items())]


def source_prints(origin: Origin) -> Iterator[tuple[Prints | None, str]]:
    """Prints of the images that a set was made from, and what could not be compared, as a note.

    Rows that the run's ``input.splits`` left out are no sources.
    """
    for plan in origin.parts:
        columns = plan.spec.input.columns.mapped()
        parts = [one for one in columns if one.split("_")[0] in COMPARED and "mask" not in one]
        path = plan.spec.input.path
        named = [columns[one] for one in parts]
        if not path or not named:
            continue
        try:
            prints = prints_of(_pictures(plan, path, named), path, bad_limit=1.0)
        except (InputError, OSError, KeyError) as error:
            yield (
                None,
                f"the source images in {path} cannot be read ({error}), so they were compared "
                "with held-out images only by key",
            )
            continue
        note = ""
        if prints.unread:
            key, why = prints.examples[0]
            note = (
                f"{prints.unread:,} source images in {path} cannot be read ({key}: {why}), so "
                "they were compared with held-out images only by key"
            )
        yield prints, note


def _pictures(plan: Plan, path: str, named: Sequence[str]) -> Iterator[Picture]:
    wanted, split = plan.spec.input.splits, plan.spec.input.columns.split
    columns = list(dict.fromkeys([*named, *([split] if wanted and split else [])]))
    for batch in parquet_source(path).batches(columns):
        splits = batch.table.column(split).to_pylist() if wanted and split else None
        for column in named:
            images = batch.table.column(column).to_pylist()
            for number, image in enumerate(images):
                is_read = splits is None or is_wanted(splits[number], wanted or ())
                if image is not None and is_read:
                    yield Picture(batch.keys[number] or batch.names[number], image)
