"""JSON files that a run leaves in its output: read tolerantly, refused by name when too new.

Each has a ``version``. A field that is not known is ignored, one that is missing has its default,
and a version is raised only where an older batchgen would misread the file.
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
    """The dataclass ``kind``, which has a ``version``, from its JSON, which lies at ``place``.

    Raises:
        NewerFormat: its version is above ``newest``.
        DamagedRecord: anything else that it is not; ends with the remedy.
    """
    try:
        found: T = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        _refuse_newer(_version_in(data), place, newest)
        raise DamagedRecord(f"{place} is damaged ({_first_fault(error)}); {remedy}") from error
    _refuse_newer(getattr(found, "version", 1), place, newest)
    return found


def parse_json(data: bytes | str) -> Any:
    """Any JSON value; None where it is none."""
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
            f"{place} was made by a newer batchgen (format {min(version, 10**6)}; this one reads "
            f"up to {newest}): use that version"
        )


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        return fault["msg"].replace("Invalid JSON", "no JSON")
    field = ".".join(str(part) for part in fault["loc"]) or "the whole"
    said = fault["msg"].removeprefix("Input ").removeprefix("Field ")
    return f"{field}: {said}"
