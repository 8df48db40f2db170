"""Configures how stores are reached: the options of fsspec's packages, timeouts and retry limits.

The spec's options of a protocol are added to fsspec's own configuration of this process, which also
has those of ``FSSPEC_<PROTOCOL>_<OPTION>`` variables and of fsspec's configuration files. So every
part of a job, and every library that it uses, reaches a store in the same way.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from batchgen.errors import InputError, SpecError, StorageFailed, nearest
from batchgen.secrets import remember

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NETWORKED = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")


@dataclass(frozen=True)
class Limits:
    """Timeouts and retry limits of stores on a network.

    The client libraries try once. All retries are in one loop, ``faults.persist``, so that the
    total time is bounded: ``patience_s`` and at most one more try. One try of a write takes at most
    its two timeouts and the time of its bytes at ``slowest_bytes_per_s``.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    patience_s: float = 45.0
    connections: int = 16
    part_bytes: int = 32 << 20
    slowest_bytes_per_s: int = 2 << 20

    def write_within_s(self, size: int) -> float:
        """Return the time limit of one try to write ``size`` bytes."""
        return self.connect_timeout_s + self.read_timeout_s + size / self.slowest_bytes_per_s


@dataclass
class _State:
    limits: Limits
    configured: bool


_STATE = _State(Limits(), False)


def configure(
    options: Mapping[str, Mapping[str, Any]] | None = None, limits: Limits | None = None
) -> None:
    """Configure this process's access to stores by these options and the current environment.

    The filesystems that fsspec caches are dropped: fsspec distinguishes them only by their explicit
    options, so a cached one would keep the keys and the endpoint of its first use.

    Args:
        options: protocol -> option -> value; ``${NAME}`` stands for an environment variable.
        limits: timeouts, retry time limit, connections and part sizes.

    Raises:
        SpecError: an unknown protocol, or a variable that is not set.
    """
    import fsspec
    import fsspec.config
    from fsspec.registry import registry

    _STATE.limits = limits or Limits()
    conf = copy.deepcopy(_configuration_at_start())
    conf["s3"] = _with_s3_limits(conf.get("s3", {}), _STATE.limits)  # s3fs uses it for s3a, too
    secrets: set[str] = set()
    for protocol, given in (options or {}).items():
        if protocol not in (known := fsspec.available_protocols()):
            allowed = f"a protocol that fsspec knows, such as s3, gs, az{nearest(protocol, known)}"
            raise SpecError("storage_options", protocol, allowed)
        resolved = {
            name: _resolved(f"storage_options.{protocol}.{name}", value, secrets)
            for name, value in given.items()
        }
        mine = conf.setdefault(protocol, {})
        for name, value in resolved.items():
            both = isinstance(value, dict) and isinstance(mine.get(name), dict)
            mine[name] = {**mine[name], **value} if both else value
    remember(secrets)
    fsspec.config.conf.clear()
    fsspec.config.conf.update(conf)
    for kind in set(registry.values()):
        kind.clear_instance_cache()
    _STATE.configured = True


def limits() -> Limits:
    return _STATE.limits


def filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL and the path in it.

    Raises:
        InputError: unknown protocol, a package that is not installed, or options that do not fit.
        StorageFailed: the host does not answer.
    """
    from fsspec.core import url_to_fs

    if not _STATE.configured:
        configure()
    try:
        fs, root = url_to_fs(url)
    except OSError as error:  # some filesystems connect when they are created
        reason = error.strerror or error
        raise StorageFailed(f"cannot reach {url}: {type(error).__name__}: {reason}") from error
    except Exception as error:  # any class: many packages, and options that the user wrote
        kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{url}: {kind}{error}{_extra_for(url)}") from error
    if hasattr(fs, "retries"):
        fs.retries = 1  # all retries are in `faults.persist`
    if "s3" in fs.protocol and fs.session is None:
        fs.session = _session(fs.kwargs)
    return fs, str(root)


def _session(kwargs: Mapping[str, Any]) -> Any:
    """Make the session as s3fs does, but without the header ``Expect``.

    A client that waits for "100 Continue" before it sends a body waits forever if the server hangs:
    no timeout runs until the body is sent (seen with aiohttp 3.14).
    """
    from aiobotocore.session import AioSession

    session = AioSession(**kwargs)
    session.register("before-call.s3", _without_expect)
    return session


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def _extra_for(url: str) -> str:
    extra = {"gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
    found = extra.get(url.partition("://")[0])
    return f"; install it with `pip install 'batchgen[{found}]'`" if found else ""


def is_networked(url: str) -> bool:
    """Whether the store is on a network, so that failed operations are retried."""
    return url.partition("://")[0] in _NETWORKED and "://" in url


def _resolved(field: str, value: Any, secrets: set[str]) -> Any:
    """Replace ``${NAME}`` by the variable's value, and add that value to ``secrets``."""
    if isinstance(value, Mapping):
        return {name: _resolved(f"{field}.{name}", one, secrets) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(field, one, secrets) for one in value]
    if not isinstance(value, str):
        return value
    match = REFERENCE.fullmatch(value)
    if match is None:
        return value
    found = os.environ.get(match.group(1))
    if found is None:
        allowed = "an environment variable that is set in each process that uses the store"
        raise SpecError(field, value, allowed)
    secrets.add(found)
    return found


@cache
def _configuration_at_start() -> dict[str, dict[str, Any]]:
    """Return the configuration that fsspec read from variables and files when it was imported."""
    import fsspec.config

    return copy.deepcopy(fsspec.config.conf)


def _with_s3_limits(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    config = {
        "connect_timeout": limits.connect_timeout_s,
        "read_timeout": limits.read_timeout_s,
        "max_pool_connections": limits.connections,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        # Many S3-compatible stores do not support checksums in trailers, boto3's default.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    defaults = {"use_listings_cache": False, "max_concurrency": min(8, limits.connections)}
    return {**defaults, **given, "config_kwargs": {**config, **given.get("config_kwargs", {})}}
