"""Wildcards: files with one text on each line, of which a template draws one by ``__NAME__``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from batchgen.errors import InputError, nearest
from batchgen.recipes.draws import Dice, best, numbered, ranked
from batchgen.recipes.grammar import (
    Choice,
    GrammarError,
    Literal,
    Part,
    Parts,
    Text,
    TooMuch,
    Wildcard,
    parse,
    wildcards,
)

MAX_LINES = 1_000_000
MAX_LINE = 10_000
MAX_PARTS = 10_000  # of the wildcards of one text, for one sample
SUFFIX = ".txt"


class Wildcards:
    """The wildcard files of a recipe: name -> lines. Each line may hold groups and wildcards.

    Args:
        place: the folder, for messages.
        lines: name of a file without its ending -> its lines.
    """

    def __init__(self, place: str, lines: Mapping[str, tuple[str, ...]]) -> None:
        self._place = place
        self._lines = lines
        self._parsed: dict[tuple[str, int], Parts] = {}
        self._sound = set[str]()

    def lines(self, name: str) -> tuple[str, ...]:
        """Return the lines of a wildcard.

        Raises:
            GrammarError: there is no such file, or it has no lines.
        """
        if name not in self._lines:
            raise GrammarError(
                f"__{name}__: there is no {name}{SUFFIX} in {self._place or 'wildcards (not set)'}"
                f"{nearest(name, self._lines)}"
            )
        return self._lines[name]

    def check(self, parts: Parts, above: tuple[str, ...] = ()) -> None:
        """Check all wildcards of a text, and those that their lines name.

        Raises:
            GrammarError: a missing file, a wildcard that contains itself, a line that is wrong.
        """
        for one in wildcards(parts):
            if one.name in above:
                circle = " > ".join((*above[above.index(one.name) :], one.name))
                raise GrammarError(f"__{one.name}__ contains itself: {circle}")
            if one.name in self._sound:
                continue
            for number, line in enumerate(self.lines(one.name)):
                if _is_special(line):
                    self.check(self.line(one.name, number), (*above, one.name))
            self._sound.add(one.name)

    def line(self, name: str, number: int) -> Parts:
        """Parse a line of a wildcard file."""
        text = self._lines[name][number]
        if not _is_special(text):
            return (Text(text),)
        found = self._parsed.get((name, number))
        if found is None:
            try:
                found = parse(text, jinja=False)
            except GrammarError as error:
                raise GrammarError(f"{name}{SUFFIX}, text {number + 1}: {error}") from None
            self._parsed[name, number] = found
        return found


def _is_special(text: str) -> bool:
    return "{" in text or "__" in text or "\\" in text


def clean_lines(data: bytes, name: str) -> tuple[str, ...]:
    """Read the lines of a wildcard file; empty lines and comments (``#``) are left out.

    Raises:
        InputError: it is not UTF-8, has no lines, or too many or too long ones.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"wildcard file {name} is not UTF-8") from None
    found = [one.strip() for one in text.replace("\0", " ").splitlines()]
    lines = tuple(one for one in found if one and not one.startswith("#"))
    if not lines:
        raise InputError(f"wildcard file {name} has no lines of text")
    if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_LINE:
        raise InputError(
            f"wildcard file {name} is too large; allowed: {MAX_LINES:,} lines of up to "
            f"{MAX_LINE:,} characters"
        )
    return lines


def wildcard_name(path: str) -> str:
    """Return the name by which templates use a file, such as ``art/styles``."""
    return str(PurePosixPath(path).with_suffix(""))


class Drawer:
    """Draws the groups and wildcards of one text for one sample after another.

    Args:
        seed: that of the recipe.
        field: the name of the text, such as ``templates.plain``.
        wildcards: what its wildcards draw from.
    """

    def __init__(self, seed: int, field: str, wildcards: Wildcards) -> None:
        self.key = b""  # of the present sample
        self.left = 0
        self._seed = seed
        self._field = field
        self._wildcards = wildcards
        self._dice: dict[str, Dice] = {}

    def word(self, name: str) -> int:
        """Draw the present sample's word for a part of the text."""
        dice = self._dice.get(name)
        if dice is None:
            dice = self._dice[name] = Dice(self._seed, f"{self._field}#{name}")
        return dice.word(self.key)

    def options(self, choice: Choice, where: str = "") -> list[int]:
        """Draw options of a group, in the order in which they are joined."""
        name = f"{where}{choice.number}"
        if not choice.several:
            return [best(self.word(name), choice.words, choice.weights)]
        order = ranked(self.word(name), choice.names, choice.weights)
        high = len(order) if choice.high == -1 else choice.high
        low = min(choice.low if choice.low != -1 else len(order), high)
        return order[: low + numbered_fairly(self.word(f"{name} count"), high - low + 1)]

    def wildcard(self, name: str, number: int, where: str = "") -> str:
        """Draw a line of a wildcard file, with what it contains."""
        place = f"{where}{name}.{number}"
        line = numbered(self.word(place), len(self._wildcards.lines(name)))
        return self.text(self._wildcards.line(name, line), f"{place}:{line}/")

    def lines(self, choice: Choice, where: str = "") -> list[str]:
        """Draw several different lines of the wildcard that is the group's only option."""
        only = choice.wildcard
        assert only is not None
        count = len(self._wildcards.lines(only.name))
        high = min(count, choice.high if choice.high != -1 else count)
        low = min(high, choice.low)
        name = f"{where}{choice.number} {only.name}"
        wanted = low + numbered_fairly(self.word(f"{name} count"), high - low + 1)
        drawn: dict[int, None] = {}
        attempt = 0
        while len(drawn) < wanted:
            drawn[numbered(self.word(f"{name} {attempt}"), count)] = None
            attempt += 1
            if attempt > 20 * wanted:  # nearly all lines are wanted: take the others in order
                drawn.update(dict.fromkeys(range(count)))
        return [
            self.text(self._wildcards.line(only.name, line), f"{name}:{line}/")
            for line in list(drawn)[:wanted]
        ]

    def begin(self, key: bytes) -> None:
        """Begin with another sample."""
        self.key, self.left = key, MAX_PARTS

    def text(self, parts: Parts, where: str = "") -> str:
        """Draw a text without Jinja.

        Raises:
            TooMuch: wildcards in wildcards would make a text without end.
        """
        self.left -= len(parts)
        if self.left < 0:
            raise TooMuch(f"more than {MAX_PARTS:,} texts from wildcards")
        return "".join(self._part(part, where) for part in parts)

    def _part(self, part: Part, where: str) -> str:
        if isinstance(part, Text | Literal):
            return part.text
        if isinstance(part, Wildcard):
            return self.wildcard(part.name, part.number, where)
        if part.several and part.wildcard:
            return part.separator.join(self.lines(part, where))
        chosen = self.options(part, where)
        return part.separator.join(self.text(part.options[one], where) for one in chosen)


def numbered_fairly(word: int, count: int) -> int:
    """Choose one of a few numbers, each with the same probability."""
    return (word * count) >> 64
