"""Sections of the spec that say how stores are reached; they change no image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from batchgen.errors import SpecError
from batchgen.model_spec import Section
from batchgen.storage import Limits, secret_fields
from batchgen.storage.connect import REFERENCE

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Storage(Section):
    """Bounds on what is done with a store over a network."""

    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = Field(default=15.0, description="without a byte, not altogether")
    patience_s: Seconds = Field(
        default=45.0, description="how long one operation that fails is tried again"
    )
    connections: Annotated[int, Field(ge=1, le=1024)] = 16
    part_bytes: Annotated[int, Field(ge=5 << 20, le=5 << 30)] = Field(
        default=32 << 20, description="of multipart uploads, for objects of two parts or more"
    )

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse secrets that are written down; they may only be named.

    Raises:
        SpecError: the field; what was given is not shown.
    """
    for protocol, given in options.items():
        if not isinstance(given, Mapping):
            raise SpecError(f"storage_options.{protocol}", "(hidden)", "options by name")
        for field, value in secret_fields(given, f"storage_options.{protocol}"):
            if not (isinstance(value, str) and REFERENCE.fullmatch(value)):
                raise SpecError(
                    field,
                    "(hidden)",
                    "the name of an environment variable that holds it, such as ${MY_SECRET}",
                )
