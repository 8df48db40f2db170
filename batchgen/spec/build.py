"""Builds a spec from a nested dictionary; reports everything that is wrong with it at once."""

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
        SpecError: one line for each wrong field: its dotted name, what was given and what is
            allowed.
    """
    faults = _all_faults(dict(tree))
    if faults:
        raise faults[0].beside(faults[1:])
    return Spec.model_validate(tree)


def stored(tree: Mapping[str, Any], **how: Any) -> Spec:
    """Read a spec from an output; an earlier version with fewer checks may have written it.

    Raises:
        SpecError: it is not a spec.
    """
    try:
        return Spec.model_validate(tree, context=STORED, **how)
    except ValidationError as error:
        first, *others = faults_of(error, _schema())
        raise first.beside(others) from None


def described_kind(kind: Any) -> str:
    """Describe the values that a pydantic adapter accepts."""
    schema = kind.json_schema()
    return described(schema, schema)


def _all_faults(tree: dict[str, Any]) -> list[SpecError]:
    """Collect the faults of single fields, then those between the fields that are left.

    pydantic runs the checks between fields only when each field is valid by itself, so wrong
    fields are removed and the rest is validated again.
    """
    found = {fault.field: fault for fault in unreadable(tree)}
    kept = spread(tree)
    fresh = list(found.values())
    while "task" not in found:  # without the task it is not known which fields go with it
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
    """Whether a fault is reported already, or follows from one that is.

    A spec whose wrong ``input.count`` was removed has no input either.
    """
    if field == "input.path" and "input.count" in found:
        return True
    return any(f"{field}.".startswith(f"{one}.") or one.startswith(f"{field}.") for one in found)


@cache
def _schema() -> dict[str, Any]:
    return Spec.model_json_schema()
