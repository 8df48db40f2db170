"""Counts labelled objects in words, for prompts: ``two dogs and a person``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)
_IRREGULAR = {
    **{"person": "people", "child": "children", "man": "men", "woman": "women"},
    **{"mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"},
    **{"knife": "knives", "leaf": "leaves", "shelf": "shelves", "wolf": "wolves", "calf": "calves"},
    **{"loaf": "loaves", "half": "halves", "sheep": "sheep", "fish": "fish", "deer": "deer"},
    **{"aircraft": "aircraft", "scissors": "scissors", "skis": "skis", "sandwich": "sandwiches"},
}


def counted(objects: Any) -> str:
    """Count objects by category, the most frequent first: ``two dogs, a cat and a person``.

    Args:
        objects: a struct of lists or a list of structs, with ``category``, or with ``name`` where
            the categories are numbers. Crowds (``iscrowd``) are not counted.

    Raises:
        TypeError: it is neither, or has numbers without names.
    """
    counts = Counter(_names(objects))
    parts = [_counted(name, count) for name, count in counts.most_common()]
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def with_article(words: str) -> str:
    """Put the article before a noun: a star, an orange star."""
    return f"{'an' if words[:1].lower() in ('a', 'e', 'i', 'o', 'u') else 'a'} {words}"


def plural(words: str) -> str:
    """Return the plural of an English noun; of several words, the last one has it."""
    before, space, noun = words.rpartition(" ")
    lower = noun.lower()
    if lower in _IRREGULAR:
        made = _IRREGULAR[lower]
    elif lower.endswith(("s", "x", "z", "ch", "sh")):
        made = f"{noun}es"
    elif lower.endswith("y") and lower[-2:-1] not in tuple("aeiou"):
        made = f"{noun[:-1]}ies"
    else:
        made = f"{noun}s"
    return f"{before}{space}{made}"


def with_names(objects: Any, names: Sequence[str] | None) -> Any:
    """Add the names of the categories to the objects of a row, if these are numbers."""
    if isinstance(objects, Mapping):
        known = objects.get("category", objects.get("category_id"))
        return objects if known is None else {**objects, "name": _named(known, names)}
    if not isinstance(objects, list):
        return objects
    return [
        {**one, "name": _named([one.get("category", one.get("category_id"))], names)[0]}
        for one in objects
        if isinstance(one, Mapping)
    ]


def _named(categories: Sequence[Any], names: Sequence[str] | None) -> list[str | None]:
    return [_name(one, names) for one in categories]


def _name(category: Any, names: Sequence[str] | None) -> str | None:
    if isinstance(category, str):
        return category
    fits = names is not None and isinstance(category, int) and 0 <= category < len(names)
    return names[category] if fits and names is not None else None


def _names(objects: Any) -> list[str]:
    if isinstance(objects, Mapping):
        found = objects.get("name", objects.get("category"))
        crowds = objects.get("iscrowd") or [0] * len(found or ())
        pairs = list(zip(found or (), crowds, strict=True))
    elif isinstance(objects, list) and all(isinstance(one, Mapping) for one in objects):
        pairs = [(one.get("name", one.get("category")), one.get("iscrowd")) for one in objects]
    else:
        raise TypeError("counted: objects with categories are needed")
    names = [name for name, crowd in pairs if not crowd]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("counted: the categories are numbers without names")
    return names


def _counted(name: str, count: int) -> str:
    shown = name.replace("_", " ")
    if count == 1:
        return with_article(shown)
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {plural(shown)}"
