"""Templates: Jinja and dynamicprompts' syntax, compiled once and rendered for each sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import meta

from batchgen.errors import SpecError
from batchgen.recipes.draws import numbered, ranked
from batchgen.recipes.grammar import (
    Choice,
    GrammarError,
    Literal,
    Parts,
    Text,
    TooMuch,
    groups,
    parse,
)
from batchgen.recipes.reasons import Refused
from batchgen.recipes.sandbox import (
    MAX_ITEMS,
    MAX_LOOPS,
    NotText,
    Sandbox,
    SecurityError,
    TemplateError,
)
from batchgen.recipes.wildcards import Drawer, Wildcards
from batchgen.spec.sections import MAX_TEXT

_RAW = re.compile(r"\{%[-+]?\s*raw")
ALLOWED = (
    "Jinja's {{ }}, {% if %}, {% for %} and {% set %}, groups {a|b}, wildcards __NAME__ "
    "(docs/recipes.md)"
)
_FAULTS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class Template:
    """A text that is made anew for each sample.

    Args:
        field: where the recipe has it, such as ``templates.plain``; draws and messages name it.
        source: the text.
        seed: that of the recipe.
        wildcards: what ``__NAME__`` draws from.

    Attributes:
        names: the columns and fields that it reads.

    Raises:
        SpecError: the text is not valid, or does what a template may not do.
    """

    def __init__(self, field: str, source: str, seed: int, wildcards: Wildcards) -> None:
        self.field = field
        self._drawer = Drawer(seed, field, wildcards)
        try:
            if _RAW.search(source):
                raise GrammarError("{% raw %}; write \\{ for a bracket")
            parts = parse(source)
            wildcards.check(parts)
            self._groups = groups(parts)
            translated = _to_jinja(parts)
            sandbox = Sandbox()
            functions: dict[str, Callable[..., Any]] = {
                "_option": self._option,
                "_options": self._options,
                "_lines": lambda number: self._drawer.lines(self._groups[number]),
                "_wildcard": self._drawer.wildcard,
                "_pick": self._pick,
            }
            self._counter = sandbox.counter
            self._made = sandbox.compiled(translated, functions)
            read = meta.find_undeclared_variables(sandbox.parse(translated))
        except GrammarError as error:
            raise _wrong(field, str(error)) from None
        except (TemplateError, SyntaxError, ValueError) as error:
            raise _wrong(field, _said(error)) from None
        except (RecursionError, MemoryError, OverflowError):
            raise _wrong(field, "it is nested too deeply") from None
        self.names = tuple(sorted(read - {"range"}))
        self._render = self._made.root_render_func
        self._context = self._made.new_context

    def render(self, key: bytes, values: Mapping[str, Any]) -> str:
        """Make the text of one sample, with single spaces between words.

        Args:
            key: the sample's own, from which everything is drawn.
            values: name -> value, of those in ``names`` that are defined and not null.

        Raises:
            Refused: the text cannot be made of these values.
            SpecError: the template does what it may not do.
        """
        self._drawer.begin(key)
        self._counter.left = MAX_LOOPS
        try:
            text = " ".join("".join(self._render(self._context(values))).split())
        except SecurityError as error:
            raise _wrong(self.field, _said(error)) from None
        except TooMuch as error:
            raise Refused("bad-template", f"{self.field}: it makes {error}") from None
        except (*_FAULTS, RecursionError) as error:
            raise self._rejected(error) from None
        if len(text) > MAX_TEXT:
            raise Refused(
                "bad-template", f"{self.field}: it makes a text of {len(text):,} characters"
            )
        return text

    def _rejected(self, error: Exception) -> Refused:
        said = _said(error)
        if isinstance(error, NotText):
            return Refused("not-utf8", f"{self.field}: {said}")
        if said.endswith("is undefined") or "has no attribute" in said:
            return Refused(
                "undefined-variable",
                f"{self.field}: {said}: the row has no such column, or it is null; "
                "{{ NAME | default('...') }} gives another text",
            )
        return Refused("bad-template", f"{self.field}: {said}")

    def _option(self, number: int) -> int:
        return self._drawer.options(self._groups[number])[0]

    def _options(self, number: int) -> list[int]:
        """The options of a group to join; -1 between two of them stands for the separator."""
        drawn = self._drawer.options(self._groups[number])
        return [one for option in drawn for one in (-1, option)][1:]

    def _pick(self, values: Any, number: int) -> Any:
        """Draw one of the values of a list, for the filter ``pick``."""
        options = list(values)[: MAX_ITEMS + 1] if not isinstance(values, str) else [values]
        if not options or len(options) > MAX_ITEMS:
            raise ValueError(f"pick: a list of 1 to {MAX_ITEMS:,} values is needed")
        names = [f"{one}" for one in options]
        word = self._drawer.word(f"pick {number}")
        if len(set(names)) < len(names):
            return options[numbered(word, len(options))]
        return options[ranked(word, names, [1.0] * len(names))[0]]


def _to_jinja(parts: Parts) -> str:
    """Translate groups and wildcards to Jinja, which calls the functions that draw."""
    return "".join(map(_part_to_jinja, parts))


def _part_to_jinja(part: Any) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Literal):
        return _insert(repr(part.text))
    if isinstance(part, Choice):
        return _choice_to_jinja(part)
    return _insert(f"{part.name!r}|_wildcard({part.number})")


def _choice_to_jinja(choice: Choice) -> str:
    number, separator = choice.number, repr(choice.separator)
    if choice.several and choice.wildcard:
        joint = _do("if not loop.first") + _insert(separator) + _do("endif")
        return _do(f"for _one in {number}|_lines") + joint + _insert("_one") + _do("endfor")
    body = _do("if _one == -1") + _insert(separator)
    for place, option in enumerate(choice.options):
        body += _do(f"elif _one == {place}") + _to_jinja(option)
    body += _do("endif")
    if choice.several:
        return _do(f"for _one in {number}|_options") + body + _do("endfor")
    return _do(f"with _one = {number}|_option") + body + _do("endwith")


def _do(statement: str) -> str:
    return "{% " + statement + " %}"


def _insert(expression: str) -> str:
    return "{{ " + expression + " }}"


def _said(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]


def _wrong(field: str, said: str) -> SpecError:
    return SpecError(field, "", ALLOWED, said=said or "it is not valid")
