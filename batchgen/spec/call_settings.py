"""The settings of a call: type, bounds and meaning of each, derived from ``Sampling``.

A setting is a field of ``Sampling``, a column of ``Columns`` that may set it row by row, and a
field of ``records.Call``, which carries it. A test checks that none of the three is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter

from batchgen.spec.model import Section
from batchgen.spec.sections import Columns, Sampling

# Fields of Sampling with checks and a column of their own.
OWN_RULES = ("negative_prompt", "lora", "approximate")
KINDS = (int, float, str, bool)


@dataclass(frozen=True)
class CallSetting:
    """One value, or list of values, that a call takes.

    Attributes:
        adapter: checks a value of it, from a row or the spec.
        kind: one of ``KINDS``: the type of the value, or of each value of a list.
        several: a list of values is allowed.
        about: what it means, in a few words.
    """

    name: str
    adapter: TypeAdapter[Any]
    kind: type
    several: bool
    about: str

    @property
    def by_row(self) -> bool:
        """Whether a column may set it."""
        return self.name in Columns.model_fields


def setting_of(section: type[Section], name: str) -> CallSetting:
    """Derive a setting from the field of a section.

    Raises:
        TypeError: the field holds values of several types, or of none of ``KINDS``.
    """
    field = section.model_fields[name]
    allowed: Any = field.annotation
    if field.metadata:
        allowed = Annotated[(allowed, *field.metadata)]
    kinds = set(_kinds(field.annotation))
    if len(kinds) != 1:
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"{section.__name__}.{name}: one type of value is needed, of {names}")
    several = any(get_origin(one) is tuple for one in get_args(field.annotation))
    return CallSetting(name, TypeAdapter(allowed), kinds.pop(), several, field.description or "")


def _kinds(kind: Any) -> list[type]:
    """Find each of ``KINDS`` anywhere in a type."""
    if kind in KINDS:
        return [kind]
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return [type(one) for one in inner]
    if get_origin(kind) is Annotated:
        inner = inner[:1]
    return [found for one in inner for found in _kinds(one)]


CALL_SETTINGS = {
    name: setting_of(Sampling, name) for name in Sampling.model_fields if name not in OWN_RULES
}
TEXT_SETTINGS = tuple(name for name, one in CALL_SETTINGS.items() if one.kind is str)
