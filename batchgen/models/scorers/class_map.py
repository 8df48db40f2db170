"""Maps labels to classes: by what the user says, by name, or by number; none may be missing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import SpecError, nearest
from batchgen.spec.score_section import ScorerSpec

SHOWN = 5


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
        SpecError: a label has no name, or there are fewer than two classes.
    """
    if isinstance(given, Mapping):
        named = {str(label): name for label, name in given.items()}
    else:
        listed = given if given is not None else names
        named = {str(number): name for number, name in enumerate(listed)}
        named |= {name: name for name in listed}
        if not listed:
            named = {value: value for value in values if isinstance(value, str)}
    _refuse_missing(spec, [value for value in values if str(value) not in named], named.values())
    if len(set(named.values())) < 2:
        allowed = f"names of at least two classes for {spec.scorer}, by label or by number"
        raise SpecError("score.options.classes", sorted(set(named.values())) or None, allowed)
    return named


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
        SpecError: a label has no class in the model.
    """
    numbers = _numbers(classes)
    found: dict[str, int] = {}
    missing = []
    for value in values:
        number = _number(value, names, numbers, len(classes), given)
        if number is None:
            missing.append(value)
        else:
            found[str(value)] = number
    _refuse_missing(spec, missing, classes)
    return found


def _number(
    value: Any,
    names: Sequence[str],
    numbers: Mapping[str, int],
    count: int,
    given: Mapping[str, str | int] | None,
) -> int | None:
    wanted: Any = value
    if given is not None and str(value) in given:
        wanted = given[str(value)]
    elif isinstance(value, int) and 0 <= value < len(names):
        wanted = names[value]
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return wanted if 0 <= wanted < count else None
    return numbers.get(_plain(str(wanted)))


def _numbers(classes: Sequence[str]) -> dict[str, int]:
    """Name -> number; ``white shark, great white shark`` gives one class two names."""
    found: dict[str, int] = {}
    for number, name in enumerate(classes):
        for one in (name, *name.split(",")):
            found.setdefault(_plain(one), number)
    return found


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _refuse_missing(spec: ScorerSpec, missing: Sequence[Any], known: Collection[str]) -> None:
    if not missing:
        return
    shown = ", ".join(repr(one) for one in sorted(missing, key=str)[:SHOWN])
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    listed = list(known)
    classes = ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
    because = (
        f"these labels have no class in it: {shown}{more}; its classes: {classes or 'none'}"
        f"{nearest(str(missing[0]), listed)} (options.classes maps labels to classes)"
    )
    raise SpecError("score.scorer", spec.title, "", because=because)
