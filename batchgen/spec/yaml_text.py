"""Parses the YAML of spec files and of ``--set``: core types only, limited in size and depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from batchgen.errors import InputError

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_NODES = 10_000  # with each alias counted as a copy


_Safe: Any = yaml.SafeLoader  # its methods have no types
_CORE = ("str", "int", "float", "bool", "null", "seq", "map")
_TAG = "tag:yaml.org,2002:"


class _Loader(_Safe):  # type: ignore[misc]
    """Loads YAML's core types only, since no field is a date; names are text and unique."""

    depth = 0
    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in _Safe.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _CORE
    }
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in known if tag.removeprefix(_TAG) in (*_CORE, "merge")]
        for first, known in _Safe.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _wrong(self.peek_event().start_mark, f"more than {MAX_DEPTH} levels of nesting")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        names = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(key.start_mark, "a name that is not text")
            if key.value in names:
                raise _wrong(key.start_mark, "the same name twice in a section")
            names.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _number_or_text(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Construct a number; a scalar that only looks like one, such as ``0x_``, stays text."""

    def constructed(loader: _Loader, node: yaml.ScalarNode) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, IndexError, KeyError):
            return node.value

    return constructed


for _kind in ("int", "float", "bool"):
    _Loader.add_constructor(_TAG + _kind, _number_or_text(_Safe.yaml_constructors[_TAG + _kind]))
_Loader.add_constructor(f"{_TAG}merge", _Safe.yaml_constructors[f"{_TAG}str"])


def parse_yaml(text: str | bytes, place: str) -> Any:
    """Parse a YAML text.

    Raises:
        InputError: it is not YAML, or is larger or deeper than a spec may be. The message names
            the ``place`` and the line, and repeats nothing of the text, which may hold a secret.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{place} is too large; a spec may have at most {MAX_BYTES:,} bytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = error.problem if isinstance(error, _Said) else _KINDS.get(type(error), "")
        raise InputError(f"{place} is not valid YAML for a spec{at}{said and ': '}{said}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{place} is not valid YAML: {type(error).__name__}") from None


class _Said(yaml.MarkedYAMLError):
    """A fault with a message of batchgen, which holds nothing of the text."""


# The messages of PyYAML quote the text, which may hold a secret, so they are replaced.
_KINDS: dict[type[Exception], str] = {
    yaml.scanner.ScannerError: "a quote, bracket, colon or indentation is wrong",
    yaml.parser.ParserError: "a bracket, comma or indentation is wrong",
    yaml.composer.ComposerError: "an undefined alias (*name), an anchor defined twice (&name), or "
    "two documents",
    yaml.constructor.ConstructorError: "a tag (!name) or merge (<<) that is not allowed in a spec",
}


def _wrong(mark: yaml.Mark, said: str) -> _Said:
    return _Said(problem=said, problem_mark=mark)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the nodes of a tree, with each alias as a copy.

    Aliases of aliases multiply: a text of 1 kB could expand to gigabytes.

    Raises:
        _Said: too many nodes, or a collection that contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise _wrong(node.start_mark, "a section or list that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        inner = [one for pair in node.value for one in pair]
    known[id(node)] = size = 1 + sum(_size(one, known) for one in inner)
    if size > MAX_NODES:
        raise _wrong(node.start_mark, f"more than {MAX_NODES} values")
    return size
