"""Plans a training set of real and synthetic images: which of them, with which labels."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from batchgen.curate.image_sets import SetRow, set_at
from batchgen.curate.mix_leaks import Say, known_leaks, without_leaks
from batchgen.curate.mix_set import LABEL, LeftOut, Mix, Mixed, MixRow, Source
from batchgen.curate.selection import selected_keys
from batchgen.errors import InputError, SpecError, nearest
from batchgen.spec.splits import is_held_out

SOURCE, STRENGTH = "source_id", "strength"
SOURCE_LABELS = ("source_label", "image_label")  # columns with the class of the source image
SPLIT, LEAKED, UNLABELLED = "held-out-split", "leak-in-copies", "no-label"
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
    _check_columns(mix, real, synthetic)
    check([real, *synthetic])
    left_out: list[LeftOut] = []
    ours = _unique(real, list(_accepted(real, mix, left_out)))
    if not ours:
        raise InputError(f"real set {mix.real}: none of its rows can be used{_why(left_out)}")
    keys = {row.key for row in ours}
    others: list[MixRow] = []
    for one in synthetic:
        rows = _unique(one, list(_accepted(one, mix, left_out, keys)))
        if not rows:
            raise InputError(
                f"synthetic set {one.images.place} has no row that can be used{_why(left_out)}"
            )
        others += rows
    classes = _classes(mix, real, ours, others)
    ours, others = without_leaks(mix, [real, *synthetic], ours, others, left_out, say)
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
    )


def _opened(mix: Mix) -> list[Source]:
    """The synthetic sets, with the keys of their selections."""
    found = []
    for number, text in enumerate(dict.fromkeys(mix.synthetic)):
        place, selection = _parted(text)
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
    if not colon or "/" in name or not place:
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


def _accepted(
    source: Source,
    mix: Mix,
    left_out: list[LeftOut],
    real_keys: frozenset[str] | set[str] = frozenset(),
) -> Iterator[MixRow]:
    """The rows of a set that may be used; the others are added to ``left_out``."""
    is_synthetic = source.name != "real"
    leaks = known_leaks(source) if is_synthetic else {}
    soft, known = mix.soft_column, source.images.columns
    label_of = mix.source_label or next((one for one in SOURCE_LABELS if one in known), "")
    more = [mix.per, "prompt"]
    if is_synthetic:
        more += [SOURCE, STRENGTH, *filter(None, [soft, label_of])]
    for row in source.rows(False, [one for one in dict.fromkeys(more) if one != LABEL]):
        reason = _refused(row, leaks)
        if reason is not None:
            left_out.append(LeftOut(row.key, source.name, *reason))
            continue
        origin = _origin(row, real_keys) if is_synthetic else None
        yield MixRow(
            row.key,
            str(row.label),
            is_synthetic,
            source.name,
            row.file,
            row.row,
            mix.weight if is_synthetic else 1.0,
            origin,
            str(row.label if mix.per == LABEL else row.more.get(mix.per)),
            row.more.get("prompt"),
            _soft(row, mix, label_of) if mix.soft_labels and is_synthetic else None,
        )


def _origin(row: SetRow, real_keys: AbstractSet[str]) -> str | None:
    """The key of the real image that a sample was made from, if the real set has it."""
    made_from = row.key.rpartition("-v")[0], str(row.more.get(SOURCE))
    return next((key for key in made_from if key in real_keys), None)


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
    missing = sorted(real - made)
    if missing and not mix.allow_fewer:
        raise InputError(
            f"the synthetic sets have no image of these classes: {_some(missing)}; generate some, "
            "or use --allow-fewer"
        )
    declared = {name: number for number, name in enumerate(source.images.classes)}
    return tuple(sorted(real, key=lambda name: (declared.get(name, len(declared)), *_order(name))))


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
        asked = {name: round(mix.ratio * number) for name, number in real.items()}
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
