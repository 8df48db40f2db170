"""Finds copies in an output, and copies of held-out, training and source images; stores both."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen.curate.columns import columns_of, quoted
from batchgen.curate.copy_columns import OtherSet, other_columns, own_columns
from batchgen.curate.image_sets import ImageSet, output_set, set_at, sources_of
from batchgen.curate.near import Either, Near, Nearest, NearImages, flipped, nearest_of, staying
from batchgen.curate.near_hashes import MOST_BITS, nearest
from batchgen.curate.near_vectors import vectors_near
from batchgen.curate.prints import Picture, Prints, prints_of
from batchgen.curate.score_sets import store_scores
from batchgen.errors import InputError, SpecError
from batchgen.output.ledger import Ledger
from batchgen.spec.splits import is_held_out
from batchgen.spec.tree import canonical_json

Array = np.ndarray[Any, Any]

INPUT = "input"  # of --against: the sources of the run itself
DISTANCE, LIKENESS = 8, 0.992  # docs/copies.md says how they were chosen
VERSION = "copies/1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_CALIBRATED = 5_000  # held-out images whose distances to the training set are measured
_QUANTILES = (0.0, 0.01, 0.05, 0.5)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ask:
    """What to search, and how near is a copy.

    Attributes:
        name: of the score set.
        against: held-out sets, or ``input``.
        training: the set that the generator was trained on.
        distance: bits in which the hashes of near copies differ at most.
        likeness: the least correlation of their pixels.
        similarity: the least cosine of their embeddings; None: embeddings are not compared.
        keep_by: a column; of a group of copies the sample with the highest value stays.
        lowest: that with the lowest value stays.
        mirrored: a mirrored image is a copy as well.
        approximate: compare embeddings by an index of faiss, which may miss pairs.
        bad_limit: fraction of the images of a set that may be unreadable.
    """

    name: str = "copies"
    against: tuple[str, ...] = ()
    training: str | None = None
    distance: int = DISTANCE
    likeness: float = LIKENESS
    similarity: float | None = None
    keep_by: str | None = None
    lowest: bool = False
    mirrored: bool = False
    approximate: bool = False
    bad_limit: float = 0.1

    def check(self) -> None:
        """Raise SpecError if a value is not allowed."""
        if not _NAME.fullmatch(self.name):
            raise SpecError("--name", self.name, "letters, digits, _ and -")
        if not 0 <= self.distance <= MOST_BITS:
            raise SpecError("--distance", self.distance, f"0 to {MOST_BITS} bits of 64")
        if not 0 < self.likeness <= 1:
            raise SpecError("--likeness", self.likeness, "more than 0, at most 1")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise SpecError("--similarity", self.similarity, "more than 0, at most 1")
        if self.lowest and not self.keep_by:
            raise SpecError("--lowest", True, "with --keep-by COLUMN")
        if self.approximate and self.similarity is None:
            raise SpecError("--approximate", True, "with --similarity COSINE")


@dataclass(frozen=True)
class Compared:
    """What a set was compared with, and what was found.

    Attributes:
        kind: ``leak``, ``memorised`` or ``source_copy``.
        place: of the set.
        images: that were compared.
        left_out: rows of other splits: not held out, or of a training set those that are.
        found: samples that are near copies of an image of the set.
        exact: those of them with equal pixels.
        unread: reason -> images that could not be read.
        examples: a few of these.
    """

    kind: str
    place: str
    images: int
    left_out: int
    found: int
    exact: int
    unread: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Copies:
    """What was found in an output.

    Attributes:
        name: of the score set.
        samples: of the output.
        copies: samples that are near copies of one that stays.
        exact: those of them with equal pixels.
        groups: samples that stay and have copies.
        compared: the other sets.
        calibration: quantile -> bits between held-out images and their nearest training image.
        notes: what a user should know.
    """

    name: str
    samples: int
    copies: int
    exact: int
    groups: int
    compared: tuple[Compared, ...] = ()
    calibration: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        """The samples that are near copies of an image of any set of a kind; an upper bound."""
        return (
            self.copies
            if kind == "copy"
            else sum(one.found for one in self.compared if one.kind == kind)
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Opened = tuple[str, ImageSet, bool | None]


def find_copies(ledger: Ledger, ask: Ask, say: Say = lambda text: None) -> Copies:
    """Find the copies in an output and store them as a score set; images are only read.

    Raises:
        SpecError: a setting that is not allowed.
        InputError: a set that cannot be read, or has no images; a column that does not exist.
    """
    ask.check()
    ours = output_set(ledger)
    opened = [*_opened(ledger, ask)]
    order_of = _ranks(ledger, ask)
    say(f"reading the images of {ledger.store.url}")
    prints = prints_of(_pictures(ours, None), ours.place, ask.bad_limit)
    _refuse_unread(prints, ours.place)
    order = np.array(sorted(range(len(prints)), key=lambda at: order_of(prints.keys[at])))
    near = _near(ledger, ask, prints)
    stays = staying(near, order)
    others = np.setdiff1d(order, stays)
    found = nearest_of(near, stays, others, len(prints))
    if ask.approximate:
        found = _completed(ledger, ask, prints, found, stays, others)
        stays = np.union1d(stays, others[found.place[others] < 0])
        others = np.setdiff1d(order, stays)
    columns = own_columns(prints, stays, found)
    compared, calibrated = list[Compared](), dict[str, Prints]()
    for kind in dict.fromkeys(kind for kind, _, _ in opened):
        sets = list(_printed(opened, kind, ask, say))
        matches = [_matched(prints, one, ask) for one in sets]
        columns += other_columns(kind, prints, sets, matches)
        compared += [_told(one, prints, match) for one, match in zip(sets, matches, strict=True)]
        if kind in ("leak", "memorised"):
            calibrated[kind] = sets[0].prints
    table = pa.table({"key": pa.array(prints.keys), **{one.name: data for one, data in columns}})
    fingerprint = hashlib.sha256(
        canonical_json(
            [VERSION, asdict(ask), ours.fingerprint, [one[1].fingerprint for one in opened]]
        ).encode()
    ).hexdigest()
    store_scores(ledger, ask.name, table, [one for one, _ in columns], fingerprint)
    exact = _exact(prints, prints, found)
    groups = len(np.unique(found.place[others]))
    return Copies(
        ask.name,
        len(prints),
        len(others),
        exact,
        groups,
        tuple(compared),
        _calibration(calibrated),
        tuple(_notes(ledger, ask, opened)),
    )


def _opened(ledger: Ledger, ask: Ask) -> Iterator[Opened]:
    """The sets to compare with: kind, set, and whether its held-out rows or the others count."""
    for place in dict.fromkeys(ask.against):
        if place == INPUT:
            for one in sources_of(ledger):
                yield "source_copy", one, None
        else:
            one = set_at(place)
            yield "leak", one, _has_held_out(one) or None
    if ask.training is not None:
        one = set_at(ask.training)
        yield "memorised", one, False if one.has_splits else None


def _has_held_out(one: ImageSet) -> bool:
    """Whether some rows are of a split that is held out, so that the others are not."""
    return one.has_splits and any(is_held_out(row.split) for row in one.read(False, ()))


def _pictures(one: ImageSet, held_out: bool | None) -> Iterator[Picture]:
    for row in one.read(True, ()):
        if held_out is None or is_held_out(row.split) == held_out:
            yield Picture(row.key, row.image)


def _refuse_unread(prints: Prints, place: str) -> None:
    if prints.unread:
        key, message = prints.examples[0]
        raise InputError(f"{place}: {key}: {message}; see `batchgen verify {place}`")


def _ranks(ledger: Ledger, ask: Ask) -> Callable[[str], Any]:
    """The rank of a sample by its key: the lowest stays."""
    if ask.keep_by is None:
        return lambda key: key
    columns = columns_of(ledger)
    columns.require([ask.keep_by], "--keep-by")
    name = quoted(ask.keep_by)
    sql = f"select key, try_cast({name} as double) as value from samples"
    table = columns.query(sql, [ask.keep_by])
    values = dict(
        zip(table.column("key").to_pylist(), table.column("value").to_pylist(), strict=True)
    )
    if all(value is None for value in values.values()):
        raise InputError(f"--keep-by {ask.keep_by}: the column has no numbers")
    sign = 1 if ask.lowest else -1

    def rank(key: str) -> tuple[bool, float, str]:
        value = values.get(key)
        missing = value is None or value != value
        return missing, 0.0 if missing or value is None else sign * value, key

    return rank


def _near(ledger: Ledger, ask: Ask, prints: Prints) -> Near:
    """What a near copy in the output is."""
    measures: list[Near] = [NearImages(prints, prints, ask.distance, ask.likeness)]
    if ask.mirrored:
        measures.append(NearImages(flipped(prints), prints, ask.distance, ask.likeness))
    if ask.similarity is not None:
        measures.append(vectors_near(ledger, prints.keys, ask.similarity, ask.approximate))
    return Either(tuple(measures))


def _completed(
    ledger: Ledger, ask: Ask, prints: Prints, found: Nearest, stays: Array, others: Array
) -> Nearest:
    """The nearest samples, where the index missed those of a copy: these are compared exactly."""
    missed = others[found.place[others] < 0]
    if not len(missed):
        return found
    near = _near(ledger, replace(ask, approximate=False), prints)
    again = nearest_of(near, stays, missed, len(prints))
    for name in ("place", "bits", "likeness"):
        getattr(found, name)[missed] = getattr(again, name)[missed]
    return found


def _printed(opened: list[Opened], kind: str, ask: Ask, say: Say) -> Iterator[OtherSet]:
    for one_kind, one, held_out in opened:
        if one_kind == kind:
            say(f"reading the images of {one.place}")
            prints = prints_of(_pictures(one, held_out), one.place, ask.bad_limit)
            left_out = 0
            if held_out is not None:
                splits = Counter(is_held_out(row.split) for row in one.read(False, ()))
                left_out = splits[not held_out]
            yield OtherSet(
                kind, one.place, prints, left_out, flipped(prints) if ask.mirrored else None
            )


def _matched(prints: Prints, other: OtherSet, ask: Ask) -> Nearest:
    """The nearest image of another set, for each sample."""
    measures: list[Near] = [NearImages(other.prints, prints, ask.distance, ask.likeness)]
    if other.flipped is not None:
        measures.append(NearImages(other.flipped, prints, ask.distance, ask.likeness))
    order = np.array(sorted(range(len(other.prints)), key=other.prints.keys.__getitem__))
    return nearest_of(Either(tuple(measures)), order, np.arange(len(prints)), len(prints))


def _told(other: OtherSet, prints: Prints, match: Nearest) -> Compared:
    return Compared(
        other.kind,
        other.place,
        len(other.prints),
        other.left_out,
        int((match.place >= 0).sum()),
        _exact(other.prints, prints, match),
        other.prints.bad,
        other.prints.examples,
    )


def _exact(first: Prints, second: Prints, found: Nearest) -> int:
    """How many of the matches have equal pixels."""
    places = np.flatnonzero(found.place >= 0)
    same = first.digests[found.place[places]] == second.digests[places]
    return int(same.all(axis=1).sum())


def _calibration(sets: dict[str, Prints]) -> dict[str, int]:
    """How far apart images are that are no copies: held-out ones and their nearest training one."""
    if len(sets) < 2:
        return {}
    held_out = sets["leak"].hashes[:_CALIBRATED, 0]
    found = nearest(np.ascontiguousarray(held_out), sets["memorised"].hashes[:, 0].copy())
    return {f"{share:.0%}": int(np.quantile(found, share)) for share in _QUANTILES}


def _notes(ledger: Ledger, ask: Ask, opened: list[Opened]) -> Iterator[str]:
    from batchgen.curate.near_vectors import has_vectors

    outputs = [ledger, *(one.ledger for _, one, _ in opened if one.ledger is not None)]
    for one in outputs:
        states = one.states(one.parts())
        if states.pending:
            yield (
                f"{one.store.url} is not finished: {len(states.committed):,} of "
                f"{len(states.numbers):,} shards were read; repeat `copies` when it is"
            )
    if ask.similarity is None and has_vectors(ledger):
        yield "the output has embeddings; --similarity COSINE compares them as well"
