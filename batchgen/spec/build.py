"""From a nested dictionary to a spec, with all that is wrong with it told at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from batchgen.errors import SpecError
from batchgen.spec.faults import described, faults_of
from batchgen.spec.spec import STORED, Spec
from batchgen.spec.tree import spread, unreadable, without


def build(tree: Mapping[str, Any]) -> Spec:
    """Validate a nested dictionary into a spec.

    Raises:
        SpecError: every field that is wrong, a line each: its dotted name, what was given and what
            is allowed.
    """
    faults = _all_faults(dict(tree))
    if faults:
        raise faults[0].beside(faults[1:])
    return Spec.model_validate(tree)


def stored(tree: Mapping[str, Any], **how: Any) -> Spec:
    """A spec that stands in an output, perhaps of an earlier version that asked for less.

    Raises:
        SpecError: it is none.
    """
    try:
        return Spec.model_validate(tree, context=STORED, **how)
    except ValidationError as error:
        first, *others = faults_of(error, _schema())
        raise first.beside(others) from None


def described_kind(kind: Any) -> str:
    """What a pydantic adapter takes, in words."""
    schema = kind.json_schema()
    return described(schema, schema)


def _all_faults(tree: dict[str, Any]) -> list[SpecError]:
    """Those of the fields, and those between the fields that are left when they are taken out."""
    found = {fault.field: fault for fault in unreadable(tree)}
    kept = spread(tree)
    fresh = list(found.values())
    while "task" not in found:  # without the task, nothing is known of what goes with it
        for fault in fresh:
            kept = without(kept, fault.field)
        try:
            Spec.model_validate(kept)
            break
        except ValidationError as error:
            fresh = [one for one in faults_of(error, _schema()) if not _is_told(one.field, found)]
        if not fresh:
            break
        found.update({fault.field: fault for fault in fresh})
    return list(found.values())


def _is_told(field: str, found: Mapping[str, SpecError]) -> bool:
    """It is the same fault, or follows from one: without its count a spec has no input."""
    if field == "input.path" and "input.count" in found:
        return True
    return any(f"{field}.".startswith(f"{one}.") or one.startswith(f"{field}.") for one in found)


@cache
def _schema() -> dict[str, Any]:
    return Spec.model_json_schema()
