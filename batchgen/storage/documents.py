"""Reads the JSON files that a run leaves in its output: tolerantly, but refuses newer formats.

Each file has a ``version``. Unknown fields are ignored and missing ones have their defaults. The
version is raised only for a change that an older batchgen would misread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from batchgen.errors import DamagedRecord, NewerFormat

T = TypeVar("T")

Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0.0, le=1e11, allow_inf_nan=False)]  # s since the epoch
Version = Annotated[int, Field(ge=1)]

_adapter: Callable[[Any], Any] = cache(TypeAdapter)


def read_document(kind: type[T], data: bytes | str, place: str, newest: int, remedy: str) -> T:
    """Read JSON into the dataclass ``kind``, which has a ``version``; messages name ``place``.

    Raises:
        NewerFormat: its version is above ``newest``.
        DamagedRecord: it is not valid for another reason; the message ends with ``remedy``.
    """
    try:
        found: T = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        _refuse_newer(_version_in(data), place, newest)
        raise DamagedRecord(f"{place} is damaged ({_first_fault(error)}); {remedy}") from error
    _refuse_newer(getattr(found, "version", 1), place, newest)
    return found


def parse_json(data: bytes | str) -> Any:
    """Parse any JSON value; None if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _version_in(data: bytes | str) -> object:
    tree = parse_json(data)
    return tree.get("version") if isinstance(tree, dict) else None


def _refuse_newer(version: object, place: str, newest: int) -> None:
    if isinstance(version, int) and version > newest:
        raise NewerFormat(
            f"{place} was written by a newer batchgen (format {min(version, 10**6)}; this version "
            f"reads up to {newest}): use the newer version"
        )


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        return fault["msg"].replace("Invalid JSON", "not valid JSON")
    field = ".".join(str(part) for part in fault["loc"]) or "the complete file"
    said = fault["msg"].removeprefix("Input ").removeprefix("Field ")
    return f"{field}: {said}"
