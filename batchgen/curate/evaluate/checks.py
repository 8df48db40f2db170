"""What must hold before an evaluation computes anything: classes, counts, and no held-out leaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchgen.curate.evaluate.leaks import equal_pairs, near_pairs, source_prints
from batchgen.curate.evaluate.protocol import Protocol
from batchgen.curate.evaluate.sets import ImageSet
from batchgen.curate.prints import Prints
from batchgen.errors import InputError, nearest

_NAMED = 5


@dataclass(frozen=True)
class Sets:
    """The sets of an evaluation; those that were not given are None.

    ``notes`` say which of their images are not used.
    """

    real: ImageSet
    synthetic: ImageSet
    held_out: ImageSet | None = None
    validation: ImageSet | None = None
    pool: ImageSet | None = None
    notes: tuple[str, ...] = ()

    def all(self) -> Iterator[ImageSet]:
        """Those that were given."""
        every = (self.real, self.synthetic, self.held_out, self.validation, self.pool)
        return (one for one in every if one is not None)

    @property
    def classes(self) -> list[str]:
        """The classes of the real set, in order."""
        return sorted(set(self.real.labels))


def check(sets: Sets, protocol: Protocol) -> list[str]:
    """Check the sets against each other.

    Returns:
        What could not be checked, as notes for the report.

    Raises:
        InputError: a class is missing, there are too few images, or held-out images are among
            those that are learnt from.
    """
    _check_classes(sets)
    if sets.held_out is None:
        return []
    _check_counts(sets, protocol)
    compared = list(source_prints(sets.synthetic.origin))
    sources = [prints for prints, _ in compared if prints is not None]
    notes = [note for _, note in compared if note]
    learnt = [one for one in (sets.real, sets.pool) if one is not None]
    for kept in filter(None, (sets.held_out, sets.validation)):
        for one in learnt:
            _refuse_shared(one, kept)
        _refuse_shared(sets.synthetic, kept, with_keys=False)
        _refuse_sources(sets.synthetic, kept, sources)
    if sets.validation is not None:
        _refuse_shared(sets.validation, sets.held_out)
    return sorted(set(notes))


def _check_classes(sets: Sets) -> None:
    """Every set has the classes of the real one, and no others."""
    wanted = set(sets.real.labels)
    if len(wanted) < 2 and sets.held_out is not None:
        raise InputError(
            f"real set {sets.real.place}: all images have the label {sets.classes[0]!r}; needed: "
            "two classes or more"
        )
    for one in sets.all():
        found = set(one.labels)
        missing, more = sorted(wanted - found), sorted(found - wanted)
        if missing:
            near = nearest(missing[0], more)
            raise InputError(
                f"{one.name} set {one.place}: no image of {_some(missing)}, which the real set "
                f"{sets.real.place} has{near}"
            )
        if more:
            raise InputError(
                f"{one.name} set {one.place}: it has {_some(more)}, which the real set "
                f"{sets.real.place} does not have; name a selection without them, or add real "
                "images of them"
            )


def _check_counts(sets: Sets, protocol: Protocol) -> None:
    """The largest K can be drawn from the real set."""
    most = max(protocol.per_class)
    name, least = min(sets.real.counts().items(), key=lambda one: one[1])
    if least < most:
        raise InputError(
            f"--per-class {most}: the real set {sets.real.place} has {least:,} images of class "
            f"{name!r}; allowed: at most {least:,}"
        )


def _refuse_shared(one: ImageSet, kept: ImageSet, with_keys: bool = True) -> None:
    """Raises InputError if an image of ``kept``, or a near copy, is in ``one``, or its key."""
    for how, same in (
        ("with equal pixels", equal_pairs(one, kept)),
        ("as near copies", near_pairs(one.prints, kept.prints)),
    ):
        if same:
            raise InputError(
                f"{len(same):,} images of the {kept.name} set {kept.place} are also in the "
                f"{one.name} set {one.place}, {how} ({_pairs(same)}); remove them from one of "
                f"both{_how_to_remove(one, kept)}"
            )
    shared = sorted(set(one.keys) & set(kept.keys)) if with_keys else []
    if shared:
        raise InputError(
            f"{len(shared):,} keys of the {kept.name} set {kept.place} are also in the {one.name} "
            f"set {one.place} ({_some(shared)}): these are other versions of the same images, or "
            "two images with one name; remove or rename them"
        )


def _how_to_remove(one: ImageSet, kept: ImageSet) -> str:
    if one.origin.ledger is None:
        return ""
    url = one.origin.ledger.store.url
    return (
        f": `batchgen copies {url} --against {kept.place}` marks them, and `batchgen select {url} "
        "--name NAME --where 'not is_leak'` leaves them out"
    )


def _refuse_sources(synthetic: ImageSet, kept: ImageSet, sources: Sequence[Prints]) -> None:
    """Raises InputError if synthetic images were made from images of ``kept``."""
    shared = sorted(synthetic.source_keys & set(kept.keys))
    if shared:
        raise InputError(
            f"the synthetic set {synthetic.place} was made from {len(shared):,} images of the "
            f"{kept.name} set {kept.place} ({_some(shared)}, by key); generate it from other images"
        )
    pairs = [pair for prints in sources for pair in near_pairs(prints, kept.prints)]
    same = sorted({key for _, key in pairs})
    if same:
        raise InputError(
            f"the input of the synthetic set {synthetic.place} has {len(same):,} images of the "
            f"{kept.name} set {kept.place}, or near copies of them ({_some(same)}, by their "
            "pixels); generate it from other images"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    shown = [f"{one} = {two}" for one, two in pairs[:_NAMED]]
    more = f" and {len(pairs) - _NAMED:,} more" if len(pairs) > _NAMED else ""
    return ", ".join(shown) + more
