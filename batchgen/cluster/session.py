"""Prepares a private Ray session for a run: closed to other users, and removed after the run."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from batchgen.cluster import sweeper
from batchgen.cluster.ray_token import PATH_VARIABLE
from batchgen.storage.cache import cache_folder

PREFIX = "bg-"
LONGEST_PLACE = 26  # bytes of the folder's path: with Ray's socket names it must stay below 108
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", PATH_VARIABLE)


@contextmanager
def private_session() -> Iterator[str]:
    """Yields the folder to start Ray in (``_temp_dir``).

    Inside, Ray listens only on the loopback address and requires a token that only this run has.
    Its folder is in one that only this user may enter, because Ray makes its own accessible to
    everybody. However the run ends, Ray's remaining processes are ended and the folder is removed.
    """
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=_place())
    with _swept(folder), _loopback(), _own_token(Path(folder) / "token"):
        yield f"{folder}/r"


def is_private() -> bool:
    """Whether this run started Ray for itself."""
    return not ray_constants.ENABLE_RAY_CLUSTER


def kept_logs() -> Path:
    """The folder with the ends of Ray's logs of runs that did not end normally."""
    return cache_folder() / "ray-logs"


def _place() -> str:
    """RAY_TMPDIR if it is set, else the system's temporary folder if Ray's socket paths fit."""
    if given := os.environ.get("RAY_TMPDIR"):
        os.makedirs(given, exist_ok=True)
        return os.path.abspath(given)
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= LONGEST_PLACE else "/tmp"


@contextmanager
def _swept(folder: str) -> Iterator[None]:
    words = [folder, str(os.getpid()), str(kept_logs())]
    with subprocess.Popen(
        [sys.executable, "-I", "-S", sweeper.__file__, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # otherwise Ctrl-C in the terminal would end it too
    ) as process:
        assert process.stdin is not None
        ending = sweeper.FAILED
        try:
            yield
            ending = sweeper.ORDERLY
        finally:
            process.stdin.write(ending)


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray listen on the loopback address only.

    Ray has this switch for systems whose firewall asks the user; ``_node_ip_address`` is not
    enough.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_token(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    before = {name: os.environ.pop(name, None) for name in OURS}
    _set({"RAY_AUTH_MODE": "token", PATH_VARIABLE: str(path)})
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    Config.initialize("")  # make Ray read the variables and the token again
    AuthenticationTokenLoader.instance().reset_cache()
