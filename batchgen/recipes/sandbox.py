"""Jinja's sandbox with limits on the length of texts, on loops and on what may be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from batchgen.recipes.counting import counted, with_article
from batchgen.recipes.grammar import TooMuch
from batchgen.spec.sections import MAX_TEXT

MAX_LOOPS = 10_000  # iterations of all loops of a template together, for one sample
MAX_ITEMS = 1_000  # values of a list that a template makes
MAX_NESTED = 100_000  # the same for lists in lists, at all depths
MAX_NUMBER = 10**18
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items"),
    *("join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("replace", "reverse", "round", "select", "selectattr", "sort", "string", "sum", "title"),
    *("trim", "truncate", "unique", "upper", "wordcount"),
)
METHODS = (
    *("upper", "lower", "title", "capitalize", "strip", "lstrip", "rstrip", "replace", "split"),
    *("startswith", "endswith", "removeprefix", "removesuffix", "items", "keys", "values", "get"),
)
_REFUSED = (
    *(nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block, nodes.Macro),
    *(nodes.CallBlock, nodes.FilterBlock, nodes.ScopedEvalContextModifier),
)
_TOO_LONG = f"a text of more than {MAX_TEXT:,} characters, or a list of more than {MAX_ITEMS:,}"


class NotText(TypeError):
    """A value is bytes: binary data, or text that is not UTF-8."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without imports, macros and files, whose texts, numbers and loops are bounded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, optimized=False, finalize=_inserted)
        self.filters = {name: _bounded(self.filters[name]) for name in FILTERS}
        self.filters["article"] = _article
        self.filters["counted"] = _bounded(counted)
        self.filters["pick"] = _listed  # replaced by a draw, see _Bounds
        self.globals = {"range": _range}
        self.counter = Counter()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute, if the result is known to be small."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% on text is not allowed; use ~ to join texts")
        if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 32):
            raise TooMuch("numbers above 1,000,000, or powers above 32, with **")
        if operator == "*":
            _check_product(left, right)
        return checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template's own, or a harmless method of a value."""
        own = getattr(obj, "__self__", None)
        if own is not None and isinstance(own, str | list | dict | tuple | int | float | bytes):
            name = obj.__name__
            if name not in METHODS:
                raise SecurityError(f"{name}() is not allowed; allowed: {', '.join(METHODS)}")
            if name == "replace":
                _check_replace(own, args)
        return checked(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse ``str.format``, which can pad a text to any length."""
        found = super().wrap_str_format(value)
        if found is not None:
            raise SecurityError("format() is not allowed; use ~ to join texts")
        return None

    def compiled(self, source: str, functions: dict[str, Callable[..., Any]]) -> Any:
        """Compile a template that may call these functions, as filters.

        Raises:
            TemplateError, SyntaxError, RecursionError: it is not valid, or not allowed.
        """
        self.filters = {**self.filters, **functions, "_joined": _joined, "_counted": self.counter}
        tree = self.parse(source)
        for node in tree.find_all(_REFUSED):
            raise SecurityError(f"{type(node).__name__.lower()} is not allowed in a template")
        for name in tree.find_all(nodes.Name):
            if name.name in ("self", "super", "caller", "varargs", "kwargs"):
                raise SecurityError(f"{name.name} is not allowed in a template")
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise SecurityError("a recursive loop is not allowed in a template")
        bounded = _Bounds(self).visit(tree)
        code = self.compile(bounded, "template", "<template>")
        return self.template_class.from_code(self, code, self.globals, None)


class _Bounds(NodeTransformer):
    """Replaces the joining of texts by a bounded one, and counts the iterations of loops."""

    def __init__(self, environment: Sandbox) -> None:
        self._environment = environment
        self._picks = 0

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *others = node.nodes
        return self._filter("_joined", first, others, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        is_own = isinstance(node.iter, nodes.Filter) and node.iter.name.startswith("_")
        if not is_own:  # groups are bounded by themselves
            node.iter = self._filter("_counted", node.iter, [], node.lineno)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        """Number the draws of ``pick``, so that each has a name."""
        self.generic_visit(node)
        if node.name != "pick" or node.node is None:
            return node
        self._picks += 1
        number = nodes.Const(self._picks, lineno=node.lineno)
        return self._filter("_pick", node.node, [number], node.lineno)

    def _filter(self, name: str, value: Any, arguments: list[Any], line: int) -> nodes.Filter:
        made = nodes.Filter(value, name, arguments, [], None, None, lineno=line)
        made.set_environment(self._environment)
        return made


def checked(value: Any) -> Any:
    """Return a value that is not too large.

    Raises:
        TooMuch: it is.
    """
    if isinstance(value, str | bytes):
        if len(value) > MAX_TEXT:
            raise TooMuch(_TOO_LONG)
    elif isinstance(value, list | tuple | dict):
        if len(value) > MAX_ITEMS or _items(value, MAX_NESTED) > MAX_NESTED:
            raise TooMuch(_TOO_LONG)
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise TooMuch(f"a number above {MAX_NUMBER:,}")
    return value


def _items(value: Any, most: int) -> int:
    """The number of items at all depths; it stops counting above ``most``."""
    if not isinstance(value, list | tuple | dict):
        return 1
    count = 0
    for one in value.values() if isinstance(value, dict) else value:
        count += _items(one, most)
        if count > most:
            break
    return count


class Counter:
    """Counts the iterations of all loops of a template, for one sample."""

    left = MAX_LOOPS

    def __call__(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.left -= 1
            if self.left < 0:
                raise TooMuch(f"more than {MAX_LOOPS:,} iterations of loops")
            yield value


def _inserted(value: Any) -> Any:
    """Return a value that ``{{ }}`` may insert into a text.

    Raises:
        UndefinedError: it is null.
        NotText: it is bytes.
        TypeError: it is no text and no number.
    """
    if isinstance(value, Undefined):
        return value  # which raises an error that names it
    if value is None:
        raise UndefinedError("a value that is null is undefined")
    if isinstance(value, bytes):
        raise NotText("binary data, or text that is not UTF-8, cannot be inserted")
    if isinstance(value, list | tuple | dict) or callable(value):
        raise TypeError(f"a {type(value).__name__} cannot be inserted; use join, first or pick")
    return value


def _bounded(made: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that its result is checked; Jinja's marks of the filter are kept."""

    @functools.wraps(made)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return checked(made(*map(_listed, args), **kwargs))

    return bounded


def _listed(value: Any) -> Any:
    """Read an iterator at most as far as a list may be long."""
    if not hasattr(value, "__next__"):
        return value
    found = []
    for one in value:
        found.append(one)
        checked(found)
    return found


def _article(text: object) -> str:
    return with_article(str(_inserted(text)))


def _range(*numbers: int) -> range:
    made = range(*numbers)
    if len(made) > MAX_ITEMS:
        raise TooMuch(f"a range of more than {MAX_ITEMS:,} numbers")
    return made


def _joined(*values: Any) -> str:
    checked(values)
    texts = [str(checked(one)) for one in values]
    if sum(map(len, texts)) > MAX_TEXT:
        raise TooMuch(_TOO_LONG)
    return "".join(texts)


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
            limit = MAX_TEXT if isinstance(one, str | bytes) else MAX_ITEMS
            if len(one) * max(other, 0) > limit:
                raise TooMuch(_TOO_LONG)


def _check_replace(text: Any, arguments: tuple[Any, ...]) -> None:
    if len(text) * max(1, max((len(str(one)) for one in arguments), default=1)) > 10 * MAX_TEXT:
        raise TooMuch(_TOO_LONG)


__all__ = ["Counter", "Sandbox", "SecurityError", "TemplateError", "TooMuch", "checked"]
