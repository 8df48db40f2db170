"""Turns pydantic's errors into plain English: the field, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from batchgen.errors import SpecError, nearest

Node = Mapping[str, Any]
_LONGEST_NAME = 60
_WORDS = {"integer": "a whole number", "number": "a number", "string": "text"}
_SEVERAL = (("a whole number", "whole numbers"), ("a number", "numbers"), ("a section", "sections"))
NEEDED = {
    "input": "a Parquet file, a folder of them, a glob or a URL",
    "output": "a folder or a URL",
    "output.url": "a folder or a URL",
}
# Flag by field, for the fields that some task requires.
FLAGS = {
    "input": "--input",
    "input.path": "--input",
    "output": "--output",
    "output.url": "--output",
    "input.columns.prompt": "--prompt-column",
    "input.columns.image": "--image-column",
    "input.columns.mask": "--mask-column",
    "input.columns.control": "--control-column",
    "input.columns.class_label": "--class-column",
}


class Faults(ValueError):
    """Faults found by a validator of several fields; pydantic collects it with its own errors."""

    def __init__(self, errors: Sequence[SpecError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


def faults_of(error: ValidationError, schema: Node) -> Iterator[SpecError]:
    """Yield each fault that pydantic reports, described by the field's JSON schema."""
    seen: set[str] = set()
    for detail in error.errors(include_url=False):
        for fault in _faults(detail, schema):
            if fault.field not in seen:
                yield fault
            seen.add(fault.field)


def missing(field: str, needed: str) -> SpecError:
    """A required field is missing; the message names its flag."""
    flag = f" (flag {FLAGS[field]})" if field in FLAGS else ""
    return SpecError(field, None, needed + flag)


def kind_of(value: object) -> str:
    """Describe the type of a value without showing the value."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else "text"


def described(node: Node, schema: Node) -> str:
    """Describe the values that a JSON schema allows."""
    node = _followed(node, schema)
    if "anyOf" in node:
        kinds = [described(one, schema) for one in node["anyOf"]]
        return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "null") or "null"
    if "enum" in node or "const" in node:
        *others, last = map(str, node.get("enum", [node.get("const")]))
        return f"{', '.join(others)} or {last}" if others else last
    kind = node.get("type")
    if kind in ("integer", "number"):
        return _WORDS[kind] + _bounds(node)
    if kind == "string":
        form, most = node.get("pattern"), node.get("maxLength")
        text = f"text of the form {form}" if form else "text"
        return f"{text}, up to {most:,} characters" if most else text
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        each = described(_items(node) or {}, schema)
        several = next((each.replace(a, b, 1) for a, b in _SEVERAL if each.startswith(a)), each)
        least, most = node.get("minItems"), node.get("maxItems")
        count = f"{least} " if least and least == most else f"{least} or more, " if least else ""
        return f"a list of {count}{several}"
    if "properties" in node:
        return f"a section of {', '.join(node['properties'])}"
    if kind == "object":
        return "a mapping from names to values"
    return "null" if kind == "null" else "a value"


def _faults(detail: Any, schema: Node) -> Sequence[SpecError]:
    found = (detail.get("ctx") or {}).get("error")
    if isinstance(found, Faults):
        return found.errors
    path, node = _place(detail["loc"], schema)
    field = ".".join(path) or "spec"
    given, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])[:_LONGEST_NAME]
        known = list(_followed(node, schema).get("properties", ()))
        allowed = f"{', '.join(known)}{nearest(name, known)}"
        return [SpecError(".".join([*path, name]), given, allowed, said="there is no such field")]
    allowed = str(found) if kind == "value_error" else described(node, schema)
    if kind == "missing" or given is None:
        return [missing(field, NEEDED.get(field, allowed))]
    hidden = any("option" in part for part in path) or _holds_more(_followed(node, schema))
    said = f"got {kind_of(given)}" if hidden or kind_of(given) in ("a mapping", "a list") else None
    return [SpecError(field, given, allowed, said)]


def _place(loc: Sequence[int | str], schema: Node) -> tuple[list[str], Node]:
    """Follow a location into the schema as far as there are fields.

    pydantic's own marks, such as those of unions, and unknown names end the path.
    """
    node, path = schema, list[str]()
    for part in loc:
        inner = _inner(node, part, schema)
        if inner is None:
            break
        node = inner
        path.append(str(part)[:_LONGEST_NAME])
    return path, node


def _inner(node: Node, part: int | str, schema: Node) -> Node | None:
    node = _followed(node, schema)
    if "anyOf" in node:
        found = (_inner(one, part, schema) for one in node["anyOf"])
        return next((one for one in found if one is not None), None)
    if isinstance(part, int):
        return _items(node)
    if part in node.get("properties", ()):
        properties: Mapping[str, Node] = node["properties"]
        return properties[part]
    others = node.get("additionalProperties")
    return (others if isinstance(others, Mapping) else {}) if others else None


def _items(node: Node) -> Node | None:
    """The schema of a list's values, which have one type; a pair has it once for each."""
    pair: Sequence[Node] = node.get("prefixItems", ())
    items: Node | None = node.get("items")
    return pair[0] if pair else items


def _followed(node: Node, schema: Node) -> Node:
    """Resolve references; of a union with null, take the other member."""
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        elif len(others := [one for one in node.get("anyOf", ()) if one != {"type": "null"}]) == 1:
            node = others[0]
        else:
            return node


def _holds_more(node: Node) -> bool:
    """Whether a value may hold further ones, and so a secret: a section, a mapping, or unknown."""
    return "properties" in node or (node.get("type") in (None, "object") and "anyOf" not in node)


def _bounds(node: Node) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    if least is not None and most is not None:
        words = [f"from {_figure(least)} to {_figure(most)}"]
    else:
        phrases = {
            "minimum": "of {} or more",
            "exclusiveMinimum": "above {}",
            "maximum": "up to {}",
            "exclusiveMaximum": "below {}",
        }
        words = [words.format(_figure(node[key])) for key, words in phrases.items() if key in node]
    bounds = f" {' and '.join(words)}" if words else ""
    step = node.get("multipleOf")
    return f"{bounds}, a multiple of {step}" if step else bounds


def _figure(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"
