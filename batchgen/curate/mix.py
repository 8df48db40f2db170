"""Plans a training set of real and synthetic images: which of them, with which labels."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal

from batchgen.curate.image_sets import SetRow, set_at
from batchgen.curate.mix_leaks import Say, known_leaks, refuse_pending, without_leaks
from batchgen.curate.mix_origins import origin_columns, with_sources
from batchgen.curate.mix_set import LABEL, LeftOut, Mix, Mixed, MixRow, Source
from batchgen.curate.selection import selected_keys
from batchgen.errors import InputError, SpecError, nearest
from batchgen.spec.splits import is_held_out

STRENGTH = "strength"
SOURCE_LABELS = ("source_label", "image_label")  # columns with the class of the source image
SPLIT, LEAKED, UNLABELLED = "held-out-split", "leak-in-copies", "no-label"
REPEATED = "in-another-set"
_SHOWN = 5


def plan_mix(
    mix: Mix, say: Say = lambda text: None, check: Callable[[Sequence[Source]], object] = len
) -> Mixed:
    """Choose the rows of a training set. The choice depends on the seed, the sets' names and the
    keys, not on the order of rows.

    Args:
        check: called with the sets before their rows are read; raises if they cannot be mixed.

    Raises:
        SpecError: a setting that is not allowed, or a column that no set has.
        InputError: sets that do not fit together, or too few images.
    """
    mix.check()
    real = Source("real", set_at(mix.real))
    synthetic = _opened(mix)
    given = [real.images, *(one.images for one in synthetic), *map(set_at, mix.held_out)]
    for images in given:
        refuse_pending(images)
    _check_columns(mix, real, synthetic)
    check([real, *synthetic])
    left_out: list[LeftOut] = []
    ours = _unique(real, list(_accepted(real, mix, left_out)))
    if not ours:
        raise InputError(f"real set {mix.real}: none of its rows can be used{_why(left_out)}")
    others: list[MixRow] = []
    for one in synthetic:
        rows = _unique(one, list(_accepted(one, mix, left_out)))
        if not rows:
            raise InputError(
                f"synthetic set {one.images.place} has no row that can be used{_why(left_out)}"
            )
        others += rows
    others = _once(ours, others, left_out)
    classes = _classes(mix, real, ours, others)
    ours, others, unread = without_leaks(mix, [real, *synthetic], ours, others, left_out, say)
    _refuse_missing(mix, classes, ours, others, left_out)
    others = with_sources(real, synthetic, ours, others)
    drawn, short = _drawn(mix, ours, others)
    orders = {one.name: one.images.classes or classes for one in synthetic}
    rows = [_softened(one, mix, classes, orders) for one in (*ours, *drawn)]
    return Mixed(
        mix,
        (real, *synthetic),
        tuple(rows),
        classes,
        tuple(left_out),
        len(others) - len(drawn),
        short,
        unread,
    )


def _opened(mix: Mix) -> list[Source]:
    """The synthetic sets, with the keys of their selections."""
    found = []
    for number, text in enumerate(dict.fromkeys(mix.synthetic)):
        place, selection = _parted(text)
        if place.endswith(":") and not selection:
            raise InputError(f"--synthetic {text}: it names no selection after the colon")
        images, keys = set_at(place), None
        if selection:
            if images.ledger is None:
                raise InputError(f"--synthetic {text}: only an output has selections")
            keys = selected_keys(images.ledger, images.ledger.parts(), selection)
        found.append(Source(f"synthetic-{number}" if number else "synthetic", images, keys))
    return found


def _parted(text: str) -> tuple[str, str]:
    """Place and selection: what follows the last colon, if it is no part of a path or URL."""
    place, colon, name = text.rpartition(":")
    if not colon or "/" in name or not place or not name:
        return text, ""
    return place, name


def _check_columns(mix: Mix, real: Source, synthetic: Sequence[Source]) -> None:
    if not real.images.has_labels:
        raise InputError(
            f"real set {mix.real} has no column of classes (label); the columns are "
            f"{', '.join(real.images.columns)}"
        )
    for one in synthetic:
        if not one.images.has_labels:
            raise InputError(f"synthetic set {one.images.place} has no column label")
    known = {name for one in synthetic for name in one.images.columns}
    asked = {"--soft-label-column": mix.soft_column, "--source-label": mix.source_label}
    asked |= {"--per": mix.per if mix.per != LABEL else None}
    for option, name in asked.items():
        if name is not None and name not in known:
            allowed = f"columns: {', '.join(sorted(known))}{nearest(name, known)}"
            raise SpecError(option, name, allowed)
    if mix.per != LABEL and mix.ratio is not None and mix.per not in real.images.columns:
        because = f"the real set has no such column, so there is no number of its {mix.per}"
        raise SpecError("--per", mix.per, "", because=because)
    computed = mix.soft_labels and mix.soft_column is None and mix.source_label is None
    if computed and not known & set(SOURCE_LABELS):
        raise SpecError(
            "--soft-labels",
            True,
            "",
            because="no synthetic set says of which class its sources were; name the column with "
            "--source-label, or a column of vectors with --soft-label-column",
        )


def _accepted(source: Source, mix: Mix, left_out: list[LeftOut]) -> Iterator[MixRow]:
    """The rows of a set that may be used; the others are added to ``left_out``."""
    is_synthetic = source.name != "real"
    leaks = known_leaks(source) if is_synthetic else {}
    soft, known = mix.soft_column, source.images.columns
    label_of = mix.source_label or next((one for one in SOURCE_LABELS if one in known), "")
    more = [mix.per, "prompt"]
    origins = origin_columns(source) if is_synthetic else []
    if is_synthetic:
        more += [STRENGTH, *origins, *filter(None, [soft, label_of])]
    for row in source.rows(False, [one for one in dict.fromkeys(more) if one != LABEL]):
        reason = _refused(row, leaks)
        if reason is not None:
            left_out.append(LeftOut(row.key, source.name, *reason))
            continue
        yield MixRow(
            row.key,
            str(row.label),
            is_synthetic,
            source.name,
            row.file,
            row.row,
            mix.weight if is_synthetic else 1.0,
            None,
            str(row.label if mix.per == LABEL else row.more.get(mix.per)),
            row.more.get("prompt"),
            _soft(row, mix, label_of) if mix.soft_labels and is_synthetic else None,
            tuple(str(row.more[one]) for one in origins if row.more.get(one) is not None),
        )


def _refused(row: SetRow, leaks: Mapping[str, str]) -> tuple[str, str] | None:
    if is_held_out(row.split):
        return SPLIT, f"its split is {row.split}"
    if row.key in leaks:
        return LEAKED, f"the score set says that it is a copy of {leaks[row.key]}"
    if row.label is None:
        return UNLABELLED, "its label is null"
    return None


def _soft(row: SetRow, mix: Mix, label_of: str) -> Mapping[str, float] | Sequence[float] | None:
    """The probabilities of the classes of a synthetic row; None: its own class only."""
    if mix.soft_column is not None:
        given = row.more.get(mix.soft_column)
        return None if given is None else [float(one) for one in given]
    origin, strength = row.more.get(label_of), row.more.get(STRENGTH)
    if origin is None or str(origin) == row.label or strength is None:
        return None
    own = min(1.0, max(0.0, float(strength))) ** mix.gamma
    return {str(row.label): own, str(origin): 1 - own}


def _unique(source: Source, rows: list[MixRow]) -> list[MixRow]:
    """The rows by key; InputError if a key comes twice."""
    rows = sorted(rows, key=lambda row: row.key)
    for one, other in itertools.pairwise(rows):
        if one.key == other.key:
            raise InputError(
                f"{source.images.place}: two rows have the key {one.key}; allowed: unique keys"
            )
    return rows


def _once(
    ours: Sequence[MixRow], others: Sequence[MixRow], left_out: list[LeftOut]
) -> list[MixRow]:
    """The synthetic rows whose image is in no earlier set; the others are added to ``left_out``."""
    first = {_image_of(row): row.set for row in ours}
    kept = []
    for row in others:
        seen = first.setdefault(_image_of(row), row.set)
        if seen == row.set:
            kept.append(row)
        else:
            left_out.append(LeftOut(row.key, row.set, REPEATED, f"the set {seen} has it as well"))
    return kept


def _image_of(row: MixRow) -> tuple[str, int | None, str]:
    """What tells whether two rows have one image: its file, and its place there."""
    scheme, found, path = row.file.rpartition("://")
    return scheme + found + posixpath.normpath(path), row.row, row.key


def _classes(
    mix: Mix, source: Source, ours: Iterable[MixRow], others: Iterable[MixRow]
) -> tuple[str, ...]:
    """The classes of both, in the order that the real set declares; without one, sorted.

    Raises:
        InputError: the synthetic sets have others, or lack some.
    """
    real, made = {row.label for row in ours}, {row.label for row in others}
    if unknown := sorted(made - real):
        raise InputError(
            f"the synthetic sets have classes that the real set does not have: {_some(unknown)}; "
            f"the real set has {_some(sorted(real))}"
        )
    _refuse_missing(mix, sorted(real), ours, others, ())
    declared = {name: number for number, name in enumerate(source.images.classes)}
    return tuple(sorted(real, key=lambda name: (declared.get(name, len(declared)), *_order(name))))


def _refuse_missing(
    mix: Mix,
    classes: Sequence[str],
    ours: Iterable[MixRow],
    others: Iterable[MixRow],
    left_out: Sequence[LeftOut],
) -> None:
    """Raise InputError if a class has no image, real or synthetic, unless that is allowed."""
    for sets, rows in (("real set has", ours), ("synthetic sets have", others)):
        found = {row.label for row in rows}
        missing = [name for name in classes if name not in found]
        if missing and not mix.allow_fewer:
            raise InputError(
                f"the {sets} no image of these classes: {_some(missing)}; add some, or use "
                f"--allow-fewer{_why(left_out)}"
            )


def _order(name: str) -> tuple[bool, int, str]:
    """Numbers by their value, then names."""
    is_number = name.isascii() and name.isdecimal()
    return not is_number, int(name) if is_number else 0, name


def _drawn(
    mix: Mix, ours: Sequence[MixRow], others: Sequence[MixRow]
) -> tuple[list[MixRow], dict[str, tuple[int, int]]]:
    """The synthetic rows of each group, drawn by the seed; and the groups with too few."""
    groups: dict[str, list[MixRow]] = {}
    for row in sorted(others, key=lambda one: _lot(mix.seed, one)):
        groups.setdefault(row.group, []).append(row)
    real = Counter(row.group for row in ours)
    asked: dict[str, int] = {}
    if mix.count is not None:
        asked = dict.fromkeys({*real, *groups} if mix.per == LABEL else groups, mix.count)
    elif mix.ratio is not None:
        asked = {name: _rounded(mix.ratio, number) for name, number in real.items()}
    else:
        return [row for name in sorted(groups) for row in groups[name]], {}
    short = {
        name: (len(groups.get(name, ())), number)
        for name, number in sorted(asked.items())
        if len(groups.get(name, ())) < number
    }
    if short and not mix.allow_fewer:
        told = [f"{name} has {has:,} of {number:,}" for name, (has, number) in short.items()]
        raise InputError(
            f"too few synthetic images: {_some(told)}; generate more, ask for fewer, or use "
            "--allow-fewer"
        )
    return [row for name in sorted(asked) for row in groups.get(name, [])[: asked[name]]], short


def _rounded(ratio: float, number: int) -> int:
    """The ratio times a number, as a whole number; a half is rounded up."""
    exact = Decimal(str(ratio)) * number
    return int(exact.to_integral_value(ROUND_HALF_UP))


def _lot(seed: int, row: MixRow) -> tuple[bytes, str, str]:
    text = f"{seed}\n{row.set}\n{row.key}"
    return hashlib.sha256(text.encode()).digest(), row.set, row.key


def _softened(
    row: MixRow, mix: Mix, classes: tuple[str, ...], orders: Mapping[str, Sequence[str]]
) -> MixRow:
    """The row with the probabilities of all classes, in the order of ``classes``.

    Args:
        orders: set -> its classes, in the order of its vectors.
    """
    if not mix.soft_labels:
        return row
    soft = row.soft
    if soft is None:
        soft = {row.label: 1.0}
    if not isinstance(soft, Mapping):
        soft = _of_vector(row, soft, orders[row.set])
    if unknown := [name for name, share in soft.items() if share and name not in classes]:
        raise InputError(
            f"{row.set}: {row.key}: the class {unknown[0]!r} of its soft label or its source is "
            f"not in the real set, which has {_some(classes)}"
        )
    return replace(row, soft=tuple(soft.get(name, 0.0) for name in classes))


def _of_vector(row: MixRow, soft: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Class -> probability, of a vector in the order of the set's classes."""
    if len(soft) != len(names) or not min(soft) >= 0 or not abs(sum(soft) - 1) <= 1e-3:
        raise InputError(
            f"{row.set}: {row.key}: the soft label {list(soft)[:_SHOWN]} is no vector of "
            f"{len(names)} probabilities; allowed: one for each class, in the order in which the "
            "set declares its classes, with the sum 1"
        )
    return dict(zip(names, soft, strict=True))


def _why(left_out: Sequence[LeftOut]) -> str:
    """The reasons for which rows were left out, for a message."""
    counts = Counter(one.reason for one in left_out)
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
    return f"; left out: {told}" if told else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
