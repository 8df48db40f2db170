"""The settings of a call: type, bounds and meaning of each, derived from ``Sampling``.

A setting is a field of ``Sampling``, a column of ``Columns`` that may set it row by row, and a
field of ``records.Call``, which carries it. A test checks that none of the three is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter

from batchgen.spec.sections import Columns, Sampling

TEXTS = ("negative_prompt", "lora")  # fields of Sampling that are not numbers


@dataclass(frozen=True)
class CallSetting:
    """One number, or list of numbers, that a call takes.

    Attributes:
        adapter: checks a value of it, from a row or the spec.
        number: ``int`` or ``float``; the type of the value, or of each value of a list.
        several: a list of values is allowed.
        about: what it means, in a few words.
    """

    name: str
    adapter: TypeAdapter[Any]
    number: type
    several: bool
    about: str

    @property
    def by_row(self) -> bool:
        """Whether a column may set it."""
        return self.name in Columns.model_fields


def _setting(name: str) -> CallSetting:
    field = Sampling.model_fields[name]
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[(kind, *field.metadata)]
    numbers = set(_numbers(field.annotation))
    (number,) = numbers
    several = any(get_origin(one) is tuple for one in get_args(field.annotation))
    return CallSetting(name, TypeAdapter(kind), number, several, field.description or "")


def _numbers(kind: Any) -> list[type]:
    """Find ``int`` and ``float`` anywhere in a type."""
    if kind in (int, float):
        return [kind]
    inner = get_args(kind)
    if get_origin(kind) is Annotated:
        inner = inner[:1]
    return [number for one in inner for number in _numbers(one)]


CALL_SETTINGS = {name: _setting(name) for name in Sampling.model_fields if name not in TEXTS}
