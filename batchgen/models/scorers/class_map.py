"""Maps labels to classes: by what the user says, by name, or by number; none may be missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import pyarrow as pa

from batchgen.errors import SpecError, nearest
from batchgen.spec.score_section import ScorerSpec

SHOWN = 5
One = TypeVar("One", str, str | int)


def declared_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a column's classes by number, from its ClassLabel; empty if it has none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface") or b"{}")
        names = features["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ()
    is_list = isinstance(names, list) and all(isinstance(one, str) for one in names)
    return tuple(names) if is_list else ()


def known_classes(spec: ScorerSpec, values: Collection[Any]) -> dict[str, Any] | None:
    """The classes of a scorer that was settled before; None if it was not.

    More rows for an output that exists have the classes that it was planned with.

    Raises:
        SpecError: one of the labels is not among them.
    """
    if spec.settled is None or not spec.settled.classes:
        return None
    known = dict(spec.settled.classes)
    _refuse_missing(spec, [value for value in values if str(value) not in known], known)
    return known


def named_labels(
    spec: ScorerSpec,
    values: Collection[Any],
    names: Sequence[str],
    given: Sequence[str] | Mapping[str, str] | None,
) -> dict[str, str]:
    """Label, as text -> the name of its class, for zero-shot classification.

    Args:
        spec: the scorer, for messages.
        values: the labels that there are.
        names: those that the input declares, by number.
        given: those of the user: by label, or by number, or the labels themselves.

    Raises:
        SpecError: a label has no name or could have two, or there are fewer than two classes.
    """
    if isinstance(given, Mapping):
        named = _by_text(spec, values, names, given)
        _refuse_almost(spec, values, named)
    elif given is not None or names:
        named = _listed(spec, values, names if given is None else given, given is None)
    else:
        named = {value: value for value in values if isinstance(value, str)}
    missing = [value for value in values if str(value) not in named]
    _refuse_missing(spec, missing, named.values(), _unused(values, given, names))
    if len(set(named.values())) < 2:
        allowed = f"names of at least two classes for {spec.scorer}, by label or by number"
        raise SpecError("score.options.classes", sorted(set(named.values())) or None, allowed)
    return named


def _listed(
    spec: ScorerSpec, values: Collection[Any], listed: Sequence[str], declared: bool
) -> dict[str, str]:
    """Label -> name, of a list of names: whole numbers are places in it, texts are its names.

    Text with the digits of a place is one, and a number is a name, where the other is not possible.
    """
    for name, count in Counter(listed).items():
        if count > 1:
            _refuse_two(spec, name, [n for n, one in enumerate(listed) if one == name], listed)
    by_number = {str(number): name for number, name in enumerate(listed)}
    by_name = {name: name for name in listed}
    texts = {str(value) for value in values}
    are_numbers = all(isinstance(value, int) for value in values)
    if declared:
        return by_number if are_numbers else by_name
    first, second = (by_number, by_name) if are_numbers else (by_name, by_number)
    if are_numbers and texts <= by_number.keys() and texts <= by_name.keys():
        for text in sorted(texts):
            if by_number[text] != text:
                _refuse_two(spec, text, [int(text), listed.index(text)], listed)
    return first if texts <= first.keys() or not texts <= second.keys() else second


def numbered_labels(
    spec: ScorerSpec,
    values: Collection[Any],
    names: Sequence[str],
    classes: Sequence[str],
    given: Mapping[str, str | int] | None,
) -> dict[str, int]:
    """Label, as text -> the number of its class in a model.

    Args:
        spec: the scorer, for messages.
        values: the labels that there are.
        names: those that the input declares, by number.
        classes: the names of the model's classes, by number.
        given: the user's: label -> name or number of its class.

    Raises:
        SpecError: a label has no class in the model, or could be one of several.
    """
    known = ClassNames(spec, classes)
    chosen = _by_text(spec, values, names, given or {})
    _refuse_almost(spec, values, chosen)
    targets = {label: _target(known, wanted) for label, wanted in chosen.items()}
    found: dict[str, int | None] = {}
    for value in values:
        text = str(value)
        found[text] = targets[text] if text in targets else _by_value(known, value, names)
    missing = [value for value in values if found[str(value)] is None]
    wrong = sorted(label for label, number in targets.items() if number is None)
    if wrong:
        allowed = f"a name of a class or its number, 0 to {len(classes) - 1}, for {spec.title}"
        raise SpecError(f"score.options.classes.{wrong[0]}", chosen[wrong[0]], allowed)
    _refuse_missing(spec, missing, classes, _unused(values, given, names))
    return {label: number for label, number in found.items() if number is not None}


class ClassNames:
    """The names of a model's classes; ``white shark, great white shark`` is one class.

    A whole name counts before one of several, and each as it is written before it is compared
    without case and with spaces for underscores.
    """

    def __init__(self, spec: ScorerSpec, classes: Sequence[str]) -> None:
        self.spec = spec
        self.classes = classes
        self._levels: list[tuple[Callable[[str], str], dict[str, list[int]]]] = []
        for several in (False, True):
            for read in (str, _plain):
                numbers: dict[str, list[int]] = {}
                for number, name in enumerate(classes):
                    listed = [part.strip() for part in name.split(",")] if several else [name]
                    for one in dict.fromkeys(read(part) for part in listed):
                        numbers.setdefault(one, []).append(number)
                self._levels.append((read, numbers))

    def number(self, name: str) -> int | None:
        """The number of the class with this name; None if there is none.

        Raises:
            SpecError: several classes have it.
        """
        for read, numbers in self._levels:
            found = numbers.get(read(name), [])
            if len(found) > 1:
                _refuse_two(self.spec, name, found, self.classes)
            if found:
                return found[0]
        return None


def _target(known: ClassNames, wanted: str | int) -> int | None:
    """The class that the user names, by name or by number."""
    if isinstance(wanted, int):
        return wanted if 0 <= wanted < len(known.classes) else None
    return known.number(wanted)


def _by_value(known: ClassNames, value: Any, names: Sequence[str]) -> int | None:
    """The class of a label that the user does not map."""
    if not isinstance(value, int) or isinstance(value, bool):
        return known.number(str(value))
    if names:
        if not 0 <= value < len(names):
            return None
        return value if list(names) == list(known.classes) else _declared(known, names[value])
    number = value if 0 <= value < len(known.classes) else None
    numeric = [name for name in known.classes if name.strip().isdecimal()]
    if len(numeric) == len(known.classes):  # the classes are called by numbers
        return known.number(str(value))
    named = known.number(str(value)) if numeric else None
    if named is not None and named != number:
        both = [one for one in (number, named) if one is not None]
        _refuse_two(known.spec, value, both, known.classes)
    return number


def _declared(known: ClassNames, name: str) -> int | None:
    """The class of a declared name, which may have several parts as well."""
    whole = known.number(name)
    if whole is not None or "," not in name:
        return whole
    parts = {known.number(part.strip()) for part in name.split(",")} - {None}
    if len(parts) > 1:
        _refuse_two(
            known.spec, name, sorted(one for one in parts if one is not None), known.classes
        )
    return next(iter(parts), None)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _refuse_two(
    spec: ScorerSpec, label: Any, numbers: Sequence[int], classes: Sequence[str]
) -> NoReturn:
    listed = " or ".join(f"number {one} ({classes[one]!r})" for one in numbers[:SHOWN])
    because = (
        f"the label {label!r} could be the class {listed}; say which with options.classes, a "
        "mapping from labels to classes"
    )
    raise SpecError("score.scorer", spec.title, "", because=because)


def _refuse_almost(spec: ScorerSpec, values: Collection[Any], given: Collection[str]) -> None:
    """Refuse a mapped label that is written otherwise than the one that there is."""
    plain = {_plain(str(value)): str(value) for value in values if str(value) not in given}
    texts = {str(value) for value in values}
    for label in given:
        if label not in texts and _plain(label) in plain:
            allowed = f"the label as the input writes it: {plain[_plain(label)]!r}"
            raise SpecError("score.options.classes", label, allowed)


def _by_text(
    spec: ScorerSpec, values: Collection[Any], names: Sequence[str], given: Mapping[str, One]
) -> dict[str, One]:
    """What the user maps labels to, where a number may be given by its declared name as well.

    Raises:
        SpecError: a label is a number and the name of another number.
    """
    found = {str(label): one for label, one in given.items()}
    for value in values:
        if not isinstance(value, int) or not 0 <= value < len(names) or names[value] not in given:
            continue
        if names[value] in map(str, values) and names[value] != str(value):
            _refuse_two(spec, names[value], [int(names[value]), value], names)
        found.setdefault(str(value), given[names[value]])
    return found


def _unused(values: Collection[Any], given: object, names: Sequence[str]) -> list[str]:
    """The labels of ``options.classes`` that no image has."""
    texts = {str(value) for value in values}
    texts |= {names[one] for one in values if isinstance(one, int) and 0 <= one < len(names)}
    return [label for label in given if label not in texts] if isinstance(given, Mapping) else []


def _refuse_missing(
    spec: ScorerSpec,
    missing: Sequence[Any],
    known: Collection[str],
    unused: Sequence[str] = (),
) -> None:
    if not missing:
        return
    shown = ", ".join(repr(one) for one in sorted(missing, key=str)[:SHOWN])
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    listed = list(known)
    classes = ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
    idle = f"; no image has its {', '.join(map(repr, unused[:SHOWN]))}" if unused else ""
    because = (
        f"these labels have no class in it: {shown}{more}; its classes: {classes or 'none'}"
        f"{nearest(str(missing[0]), listed)} (options.classes maps labels to classes{idle})"
    )
    raise SpecError("score.scorer", spec.title, "", because=because)
