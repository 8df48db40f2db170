"""The types of values without a declared type, as CSV and JSON have them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.errors import shown

INT64 = range(-(1 << 63), 1 << 63)
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DIGITS, _MOST_DIGITS = 25, 400
MOST_NAMES = 10_000  # different texts of a column that can be classes


@dataclass
class Texts:
    """What the cells of a column of a CSV file can be: whole numbers, numbers or text."""

    whole: bool = True
    number: bool = True
    empty: bool = True
    distinct: set[str] | None = field(default_factory=set)

    def see(self, text: str) -> None:
        """Take a cell into account; an empty one can be anything."""
        if text == "":
            return
        self.empty = False
        self.whole = self.whole and _is_whole(text)
        self.number = self.number and _is_number(text)
        if self.distinct is not None:
            self.distinct.add(text)
            if len(self.distinct) > MOST_NAMES:
                self.distinct = None

    def type(self) -> pa.DataType:
        """Whole numbers, numbers or text; text if all cells are empty."""
        if self.empty or not self.number:
            return pa.string()
        return pa.int64() if self.whole else pa.float64()

    def fits(self, text: str, where: str) -> Any:
        """The cell in the column's type. Raises ValueError if it is of another one."""
        return from_text(text, self.type(), where)


def from_text(text: str, kind: pa.DataType, where: str) -> Any:
    """A cell as a value of a column's type; an empty one is null.

    Raises:
        ValueError: it is not of this type; says where, what was given and what is allowed.
    """
    if text == "":
        return None
    if pa.types.is_integer(kind):
        if not _is_whole(text):
            raise ValueError(f"{where}: got {shown(text)}; allowed: whole numbers of 64 bit")
        return int(text)
    if pa.types.is_floating(kind):
        if not _is_number(text):
            raise ValueError(f"{where}: got {shown(text)}; allowed: finite numbers")
        return float(text)
    return text


def _is_whole(text: str) -> bool:
    return len(text) < _DIGITS and _WHOLE.fullmatch(text) is not None and int(text) in INT64


def _is_number(text: str) -> bool:
    """Whether a cell is a number; a whole one only if no digit is lost, such as those of an id."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return False
    return not _WHOLE.fullmatch(text) or int(float(text)) == int(text[:_MOST_DIGITS])


@dataclass
class Kinds:
    """The type of the values of a JSON field: that of the first one, widened by later ones.

    A value that does not fit does not change the type; ``fits`` refuses it later.
    """

    kind: str | None = None  # bool, int, float, str, list, dict
    inner: Kinds | None = None
    fields: dict[str, Kinds] = field(default_factory=dict)
    distinct: set[str] | None = field(default_factory=set)

    def see(self, value: Any) -> None:
        """Take a value into account; null can be anything."""
        if value is None:
            return
        kind = kind_of(value)
        if self.kind is None or (self.kind == "int" and kind == "float"):
            self.kind = kind
        if self.kind != kind and not (self.kind == "float" and kind == "int"):
            return
        if kind == "str":
            self._name(value)
        if kind == "list":
            self.inner = self.inner or Kinds()
            for one in value:
                self.inner.see(one)
        if kind == "dict":
            for name, one in value.items():
                self.fields.setdefault(name, Kinds()).see(one)

    def _name(self, text: str) -> None:
        if self.distinct is not None:
            self.distinct.add(text)
            if len(self.distinct) > MOST_NAMES:
                self.distinct = None

    def type(self) -> pa.DataType:
        """The Arrow type; text, if all values are null."""
        if self.kind == "list":
            return pa.list_(self.inner.type() if self.inner else pa.string())
        if self.kind == "dict" and self.fields:
            return pa.struct([(name, one.type()) for name, one in self.fields.items()])
        plain = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
        return plain.get(self.kind or "", pa.string())

    def fits(self, value: Any, where: str) -> Any:
        """The value in the column's type.

        Raises:
            ValueError: it is of another type; says where, what was given and what is allowed.
        """
        if value is None or self.kind is None:
            return value
        kind = kind_of(value)
        if self.kind == "float" and kind in ("int", "float"):
            return _exact(value, where)
        if kind != self.kind:
            raise ValueError(f"{where}: got {_WORDS[kind]}; allowed: {_WORDS[self.kind]}")
        if kind == "int" and value not in INT64:
            raise ValueError(f"{where}: got {shown(value)}; allowed: whole numbers of 64 bit")
        if kind == "list" and self.inner is not None:
            return [self.inner.fits(one, f"{where}[{at}]") for at, one in enumerate(value)]
        if kind == "dict":  # one without fields is null, since Parquet has no empty structs
            fits = {name: self.fields[name].fits(value[name], f"{where}.{name}") for name in value}
            return fits if self.fields else None
        return value


def _exact(value: float, where: str) -> float:
    """The number as a float. Raises ValueError if it is infinite, or loses digits."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (isinstance(value, int) and int(number) != value):
        raise ValueError(f"{where}: got {shown(value)}; allowed: numbers of 64 bit")
    return number


_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "an object",
}


def kind_of(value: Any) -> str:
    """The JSON kind of a value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "str"
    return "dict" if isinstance(value, Mapping) else "list"
