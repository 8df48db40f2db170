"""How a store is reached: options of its fsspec package, and the one place of its limits.

What a spec says of a protocol becomes fsspec's own configuration of this process, beside what
``FSSPEC_<PROTOCOL>_<OPTION>`` variables and fsspec's configuration files say. So every part of a
job, and every library below it, reaches a store alike.
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
    """Bounds on what is done with a store over a network.

    The client libraries try once; what failed is tried again in one loop, ``faults.persist``, so
    that the sum is bounded: ``patience_s`` and at most one more try. One try of a write takes no
    longer than its two timeouts and its bytes at ``slowest_bytes_per_s``.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    patience_s: float = 45.0
    connections: int = 16
    part_bytes: int = 32 << 20
    slowest_bytes_per_s: int = 2 << 20

    def write_within_s(self, size: int) -> float:
        """How long one try may take to write so many bytes."""
        return self.connect_timeout_s + self.read_timeout_s + size / self.slowest_bytes_per_s


@dataclass
class _State:
    limits: Limits
    configured: bool


_STATE = _State(Limits(), False)


def configure(
    options: Mapping[str, Mapping[str, Any]] | None = None, limits: Limits | None = None
) -> None:
    """Reach stores by these options, and by what the environment says now, from now on.

    Filesystems that fsspec keeps for this process are made anew: it tells them apart by their
    options alone, so that one would go on with the keys and the endpoint of its first use.

    Args:
        options: protocol -> option -> value; ``${NAME}`` stands for an environment variable.
        limits: timeouts, patience, connections and part sizes.

    Raises:
        SpecError: a protocol that there is not, or a variable that is not set.
    """
    import fsspec
    import fsspec.config
    from fsspec.registry import registry

    _STATE.limits = limits or Limits()
    conf = copy.deepcopy(_configuration_at_start())
    conf["s3"] = _with_s3_limits(conf.get("s3", {}), _STATE.limits)  # s3a has it from there
    secrets: set[str] = set()
    for protocol, given in (options or {}).items():
        if protocol not in (known := fsspec.available_protocols()):
            allowed = f"a protocol of a store, such as s3, gs or az{nearest(protocol, known)}"
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
    """The filesystem of a URL and the path in it.

    Raises:
        InputError: no such protocol, its package is not installed, or the options do not suit it.
        StorageFailed: nothing answers there.
    """
    from fsspec.core import url_to_fs

    if not _STATE.configured:
        configure()
    try:
        fs, root = url_to_fs(url)
    except OSError as error:  # some connect at once
        reason = error.strerror or error
        raise StorageFailed(f"cannot reach {url}: {type(error).__name__}: {reason}") from error
    except Exception as error:  # of packages by the dozen, from options that are the user's
        kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{url}: {kind}{error}{_extra_for(url)}") from error
    if hasattr(fs, "retries"):
        fs.retries = 1  # `faults.persist` is the one loop
    if "s3" in fs.protocol and fs.session is None:
        fs.session = _session(fs.kwargs)
    return fs, str(root)


def _session(kwargs: Mapping[str, Any]) -> Any:
    """As s3fs makes it, but for one header.

    Clients that wait for "100 Continue" before they send a body wait for it without end: no time
    limit runs until the body is sent (aiohttp 3.14, seen with a server that hangs).
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
    return f"; `pip install 'batchgen[{found}]'` brings it" if found else ""


def is_networked(url: str) -> bool:
    """A store whose faults pass: what failed there is tried again for a while."""
    return url.partition("://")[0] in _NETWORKED and "://" in url


def _resolved(field: str, value: Any, secrets: set[str]) -> Any:
    """The value with its references followed; what they stood for counts as secret."""
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
        raise SpecError(field, value, "a variable that is set in this process's environment")
    secrets.add(found)
    return found


@cache
def _configuration_at_start() -> dict[str, dict[str, Any]]:
    """What fsspec took from variables and files when it was loaded."""
    import fsspec.config

    return copy.deepcopy(fsspec.config.conf)


def _with_s3_limits(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    config = {
        "connect_timeout": limits.connect_timeout_s,
        "read_timeout": limits.read_timeout_s,
        "max_pool_connections": limits.connections,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        # Checksums in trailers are newer than many stores that speak S3.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    defaults = {"use_listings_cache": False, "max_concurrency": min(8, limits.connections)}
    return {**defaults, **given, "config_kwargs": {**config, **given.get("config_kwargs", {})}}
