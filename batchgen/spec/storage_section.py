"""Sections of the spec that say how stores are reached. They do not change images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from batchgen.errors import SpecError
from batchgen.secrets import secret_in
from batchgen.spec.faults import kind_of
from batchgen.spec.model import Section
from batchgen.storage import Limits
from batchgen.storage.connect import REFERENCE

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]

# Options whose values are not secret, by their last name. All others may only refer to an
# environment variable, since the plan and job.yaml store the spec.
HARMLESS = frozenset(
    (
        *("endpoint_url", "endpoint", "profile", "region_name", "region", "signature_version"),
        *("addressing_style", "default_acl", "acl", "mode", "tcp_keepalive", "us_east_1_regional"),
        *("ACL", "ServerSideEncryption", "SSEKMSKeyId", "StorageClass", "RequestPayer"),
        *("project", "access", "consistency", "default_location", "requester_pays", "location"),
        *("account_name", "account_host", "location_mode", "tenant_id"),
        *("revision", "repo_type", "org", "repo", "ref", "sha", "branch"),
        *("host", "port", "user", "username", "encoding", "protocol", "kerb_kwargs", "timeout"),
        *("target_protocol", "remote_protocol", "cache_storage", "compression", "fo", "root"),
        *("User-Agent", "Accept", "Accept-Encoding", "user_agent", "verify"),
        *("anon", "use_ssl", "version_aware", "use_listings_cache", "auto_mkdir", "trust_env"),
    )
)
# Options that hold further options.
HOLDERS = frozenset(
    (
        *("client_kwargs", "config_kwargs", "s3", "s3_additional_kwargs", "retries", "headers"),
        *("target_options", "remote_options"),
    )
)
_SECRET_NAME = re.compile(
    r"secret|token|passw|credential|sas|account_key|access_key|api_key|connection_string|auth|^key$",
    re.IGNORECASE,
)
_TOKEN_WORDS = ("anon", "cloud", "google_default", "browser", "cache")  # gcsfs: how to get a token


class Storage(Section):
    """Timeouts, retries and connections of stores on a network."""

    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = Field(
        default=15.0, description="time without any byte, not of the complete transfer"
    )
    patience_s: Seconds = Field(
        default=45.0, description="how long one failing operation is retried"
    )
    connections: Annotated[int, Field(ge=1, le=1024)] = 16
    part_bytes: Annotated[int, Field(ge=5 << 20, le=5 << 30)] = Field(
        default=32 << 20,
        description="part size of multipart uploads, which are used for objects of two parts or "
        "more",
    )

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


def check_options(options: object) -> None:
    """Refuse options of a wrong form, and secrets that are not given as ``${VARIABLE}``.

    Raises:
        SpecError: names each wrong field; the values are not shown.
    """
    faults = list(option_faults(options))
    if faults:
        raise faults[0].beside(faults[1:])


def option_faults(options: object) -> Iterator[SpecError]:
    """Yield the faults of ``storage_options``."""
    if not isinstance(options, Mapping):
        yield _is_no_mapping("storage_options", options, "options by protocol")
        return
    yield from _names_that_are_none(options, "storage_options")
    for protocol, given in options.items():
        field = f"storage_options.{protocol}"
        if not isinstance(given, Mapping):
            yield _is_no_mapping(field, given, "options by name")
            continue
        for name, value in given.items():
            yield from _literals(value, f"{field}.{name}", is_known=True)


def _names_that_are_none(options: Mapping[Any, Any], field: str) -> Iterator[SpecError]:
    """Refuse names that are not text: Python callers may pass a number, such as 1."""
    for name, value in options.items():
        if not isinstance(name, str):
            yield SpecError(field, name, f'text as option names; write "{name}" in quotes')
        if isinstance(value, Mapping):
            yield from _names_that_are_none(value, f"{field}.{name}")


def _is_no_mapping(field: str, given: object, allowed: str) -> SpecError:
    return SpecError(field, given, allowed, said=f"got {kind_of(given)}")


def _literals(value: Any, field: str, is_known: bool) -> Iterator[SpecError]:
    """Refuse texts that might be a secret, and numbers whose name suggests one."""
    name = field.rpartition(".")[2]
    if isinstance(value, Mapping):
        is_holder = is_known and name in HOLDERS
        for inner, one in value.items():
            yield from _literals(one, f"{field}.{inner}", is_holder)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _literals(one, field, is_known)
    elif not _is_harmless(value, name, is_known):
        yield SpecError(
            field,
            value,
            "${VARIABLE}, read from the environment of each process that uses the store",
            said="may be a secret in plain text",
        )


def _is_harmless(value: Any, name: str, is_known: bool) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return not _SECRET_NAME.search(name)
    if not isinstance(value, str):
        return False
    if REFERENCE.fullmatch(value) or (name == "token" and value in _TOKEN_WORDS):
        return True
    return is_known and name in HARMLESS and secret_in(value) is None
