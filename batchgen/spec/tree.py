"""A spec as nested dictionaries, before it is checked: read from a file, merged with flags."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from batchgen.errors import InputError, SpecError
from batchgen.spec.yaml_text import MAX_BYTES, MAX_DEPTH, parse_yaml

# Sections that may be written as a text, which is the value of this field.
PLAIN = {"input": "path", "model": "path", "output": "url"}


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: str) -> dict[str, Any]:
    """A spec file as nested dictionaries.

    Raises:
        InputError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)  # a device never ends
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"spec file {path}: {reason or error}") from error
    tree = parse_yaml(text, f"spec file {path}")
    if not isinstance(tree, dict):
        raise InputError(f"spec file {path}: expected sections such as input: and output:")
    return tree


def spread(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With the sections that are written as a text, such as ``model: owner/name``, in full."""
    return {
        name: {PLAIN[name]: value} if name in PLAIN and isinstance(value, str) else value
        for name, value in tree.items()
    }


def merge(base: Mapping[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with every dotted path set to its value; the later wins."""
    merged: dict[str, Any] = spread(copy.deepcopy(dict(base)))
    for path, value in dotted.items():
        if path in PLAIN and isinstance(value, str):
            path = f"{path}.{PLAIN[path]}"
        *sections, field = path.split(".")
        if len(sections) >= MAX_DEPTH:
            raise SpecError(path[:60], value, f"up to {MAX_DEPTH} levels", said="is too deep")
        place = merged
        for depth, section in enumerate(sections, start=1):
            inner = place.get(section)
            if inner is None:
                inner = place[section] = {}
            if not isinstance(inner, dict):
                outer = ".".join(sections[:depth])
                raise SpecError(outer, inner, f"a section that holds {path!r}", "holds a value")
            place = inner
        place[field] = value
    return merged


def unreadable(tree: object, path: str = "") -> Iterator[SpecError]:
    """Texts that no file, name or message can hold, by their fields."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from unreadable(value, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from unreadable(value, f"{path}.{number}")
    for text in (path, tree):
        if isinstance(text, str) and ("\0" in text or not _is_unicode(text)):
            field = ascii(path)[1:-1]
            yield SpecError(
                field, text, "Unicode text", said="has bytes that are not UTF-8, or NUL"
            )
            return


def without(tree: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy of the tree without a dotted field, if it is there; of a list's, without the list."""
    first, _, rest = field.partition(".")
    inner = tree.get(first)
    kept = {name: value for name, value in tree.items() if name != first}
    return {**kept, first: without(inner, rest)} if rest and isinstance(inner, Mapping) else kept


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
