"""Reads a spec file into nested dictionaries and merges flags into them, before any checks."""

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
    """Format a value as JSON with sorted keys and no spaces, for hashing."""
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
    """Read a spec file into nested dictionaries.

    Raises:
        InputError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)  # bounded, since a device such as /dev/zero never ends
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"spec file {path}: {reason or error}") from error
    tree = parse_yaml(text, f"spec file {path}")
    if not isinstance(tree, dict):
        raise InputError(f"spec file {path}: expected sections such as input: and output:")
    return tree


def spread(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Expand sections that are written as a text, such as ``model: owner/name``."""
    return {
        name: {PLAIN[name]: value} if name in PLAIN and isinstance(value, str) else value
        for name, value in tree.items()
    }


def merge(base: Mapping[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Copy ``base`` and set every dotted path to its value; later ones win."""
    merged: dict[str, Any] = spread(copy.deepcopy(dict(base)))
    for path, value in dotted.items():
        if path in PLAIN and isinstance(value, str):
            path = f"{path}.{PLAIN[path]}"
        *sections, field = path.split(".")
        if len(sections) >= MAX_DEPTH:
            allowed = f"at most {MAX_DEPTH} levels"
            raise SpecError(path[:60], value, allowed, said="has too many levels")
        place = merged
        for depth, section in enumerate(sections, start=1):
            inner = place.get(section)
            if inner is None:
                inner = place[section] = {}
            if not isinstance(inner, dict):
                outer = ".".join(sections[:depth])
                allowed = f"a section, so that {path!r} can be set in it"
                raise SpecError(outer, inner, allowed, said="is a single value, not a section")
            place = inner
        place[field] = value
    return merged


def unreadable(tree: object, path: str = "") -> Iterator[SpecError]:
    """Find texts that cannot be written to files or messages; yields a fault for each field."""
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
                field, text, "Unicode text", said="contains bytes that are not UTF-8, or NUL"
            )
            return


def without(tree: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Copy the tree without a dotted field. A field inside a list removes the complete list."""
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
