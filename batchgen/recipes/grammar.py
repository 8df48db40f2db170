"""The syntax of dynamicprompts in templates: ``{a|b}``, weights, ``{2$$a|b|c}``, ``__wildcard__``.

A text is parsed into a tree. Parts in Jinja's own syntax stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from batchgen.recipes.draws import word_of

MAX_NESTING = 12
MAX_OPTIONS = 1000
SEPARATOR = ", "
WILDCARD = re.compile(r"__([A-Za-z0-9]+(?:[._/ -][A-Za-z0-9]+)*)__")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::")
_COUNT = re.compile(r"\s*(?:(\d*)(-)(\d*)|(\d+))\$\$")
_JINJA = {"{{": "}}", "{%": "%}", "{#": "#}"}
_ESCAPED = "{}|_$"


class GrammarError(ValueError):
    """A text that is not in the syntax; the message says where, and what is allowed."""


class TooMuch(ValueError):
    """A text wants more than the limits allow for one sample."""


@dataclass(frozen=True)
class Text:
    """Text, which may hold Jinja."""

    text: str


@dataclass(frozen=True)
class Literal:
    """A character that was written with a backslash."""

    text: str


@dataclass(frozen=True)
class Wildcard:
    """A line of a file. ``number`` counts the occurrences of this name in the text."""

    name: str
    number: int


@dataclass(frozen=True)
class Choice:
    """A group of options, of which ``low`` to ``high`` are drawn and joined by the separator.

    ``number`` is its place among the groups of the text; ``names`` are the options as they are
    written, which is how a draw knows them.
    """

    number: int
    options: tuple[Parts, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    low: int = 1
    high: int = 1
    separator: str = SEPARATOR

    @cached_property
    def words(self) -> list[int]:
        """The words of the options, see ``draws``."""
        return list(map(word_of, self.names))

    @property
    def several(self) -> bool:
        """Whether another number than one is drawn."""
        return (self.low, self.high) != (1, 1)

    @property
    def wildcard(self) -> Wildcard | None:
        """The wildcard that is the only option: of ``{2$$__places__}``, two lines are drawn."""
        if len(self.options) != 1 or len(self.options[0]) != 1:
            return None
        only = self.options[0][0]
        return only if isinstance(only, Wildcard) else None


Part = Text | Literal | Wildcard | Choice
Parts = tuple[Part, ...]


def parse(text: str, jinja: bool = True) -> Parts:
    """Parse a text.

    Args:
        jinja: whether ``{{``, ``{%`` and ``{#`` begin Jinja; if not, they are refused.

    Raises:
        GrammarError: a bracket that is not closed, a group without options, and so on.
    """
    return _Parser(text, jinja).parts()


def groups(parts: Parts) -> list[Choice]:
    """List the groups of a text, at any depth."""
    found = []
    for part in parts:
        if isinstance(part, Choice):
            found.append(part)
            for option in part.options:
                found += groups(option)
    return found


def wildcards(parts: Parts) -> list[Wildcard]:
    """List the wildcards of a text, at any depth."""
    found = []
    for part in parts:
        if isinstance(part, Wildcard):
            found.append(part)
        elif isinstance(part, Choice):
            found += [one for option in part.options for one in wildcards(option)]
    return found


class _Parser:
    def __init__(self, text: str, jinja: bool) -> None:
        self._text = text
        self._jinja = jinja
        self._at = 0
        self._groups = 0
        self._seen: dict[str, int] = {}

    def parts(self, depth: int = 0) -> Parts:
        """Read up to the end; inside a group up to its next ``|`` or ``}``."""
        found: list[Part] = []
        plain = ""
        while self._at < len(self._text) and not (depth and self._text[self._at] in "|}"):
            part = self._special(depth)
            if part is None:
                plain += self._text[self._at]
                self._at += 1
            elif isinstance(part, Text):
                plain += part.text
            else:
                found += [Text(plain), part] if plain else [part]
                plain = ""
        return (*found, Text(plain)) if plain else tuple(found)

    def _special(self, depth: int) -> Part | None:
        """Read what is not plain text at this place, if anything is."""
        two = self._text[self._at : self._at + 2]
        if two in _JINJA:
            return self._opaque(two)
        if two[0] == "\\" and two[1:] and two[1] in _ESCAPED:
            self._at += 2
            return Literal(two[1])
        if two[0] == "{":
            return self._choice(depth + 1)
        found = WILDCARD.match(self._text, self._at) if two == "__" else None
        if found is None:
            return None
        self._at = found.end()
        name = found[1]
        self._seen[name] = self._seen.get(name, -1) + 1
        return Wildcard(name, self._seen[name])

    def _opaque(self, begin: str) -> Text:
        """Read a part in Jinja's syntax up to its end; quoted texts in it may hold brackets."""
        if not self._jinja:
            raise GrammarError(f"{begin} at character {self._at}; allowed: no Jinja in this text")
        start, end = self._at, _JINJA[begin]
        self._at += 2
        quote = ""
        while self._at < len(self._text):
            here = self._text[self._at]
            if not quote and self._text.startswith(end, self._at):
                self._at += 2
                return Text(self._text[start : self._at])
            if begin != "{#" and here in "'\"" and quote in ("", here):
                quote = "" if quote else here
            self._at += 2 if quote and here == "\\" else 1
        raise GrammarError(f"{begin} at character {start} has no {end}")

    def _choice(self, depth: int) -> Choice:
        start, number = self._at, self._groups
        if depth > MAX_NESTING:
            raise GrammarError(f"more than {MAX_NESTING} groups in each other")
        self._groups += 1
        self._at += 1
        low, high, separator = self._head(start)
        options, names, weights = list[Parts](), list[str](), list[float]()
        while True:
            weights.append(self._weight())
            begin = self._at
            options.append(self.parts(depth))
            names.append(self._text[begin : self._at])
            if self._at >= len(self._text):
                raise GrammarError(f"{{ at character {start} has no }}; write \\{{ for a bracket")
            self._at += 1
            if self._text[self._at - 1] == "}":
                break
        shown = self._text[start : self._at][:60]
        made = Choice(
            number, tuple(options), _told_apart(names), tuple(weights), low, high, separator
        )
        _check(made, shown)
        return made

    def _head(self, start: int) -> tuple[int, int, str]:
        """Read ``2$$``, ``1-2$$`` and a separator that ends in ``$$``; -1 means all options."""
        found = _COUNT.match(self._text, self._at)
        if found is None:
            return 1, 1, SEPARATOR
        self._at = found.end()
        first, dash, last, only = found.groups()
        low, high = (int(only), int(only)) if not dash else (int(first or 1), int(last or -1))
        rest = re.compile(r"([^{}|$]{0,100})\$\$").match(self._text, self._at)
        if rest is None:
            return low, high, SEPARATOR
        self._at = rest.end()
        return low, high, rest[1]

    def _weight(self) -> float:
        found = _WEIGHT.match(self._text, self._at)
        if found is None:
            return 1.0
        self._at = found.end()
        return float(found[1])


def _told_apart(names: list[str]) -> tuple[str, ...]:
    """Number options that are written twice, such as ``{a|a|b}``, so that each is drawn."""
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(name if seen[name] == 1 else f"{name}\0{seen[name]}")
    return tuple(told)


def _check(made: Choice, shown: str) -> None:
    options = len(made.options)
    if options == 1 and made.low == made.high == 1:
        raise GrammarError(
            f"{shown} has one option; write {{{{ name }}}} to insert a column, {{a|b}} to draw one "
            "of several texts, \\{ for a bracket"
        )
    if options > MAX_OPTIONS:
        raise GrammarError(f"{shown} has more than {MAX_OPTIONS} options; use a wildcard file")
    drawn = sum(weight > 0 for weight in made.weights)
    if not drawn:
        raise GrammarError(f"{shown}: at least one weight must be above 0")
    most = max(made.low, made.high)
    if made.high != -1 and made.low > made.high:
        raise GrammarError(f"{shown}: the first number must not be larger than the second")
    if most > drawn and made.wildcard is None:
        raise GrammarError(f"{shown} has {drawn} options to draw {most} from")
    if most > MAX_OPTIONS:
        raise GrammarError(f"{shown} draws more than {MAX_OPTIONS} options")
