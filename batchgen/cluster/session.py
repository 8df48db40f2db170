"""The surroundings of a Ray that a run starts for itself: closed to others, gone with the run."""

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
LONGEST_PLACE = 26  # of a folder's name, in bytes: what Ray's sockets add must stay below 108
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", PATH_VARIABLE)


@contextmanager
def private_session() -> Iterator[str]:
    """Yields the folder that Ray is to be started in (``_temp_dir``).

    Inside, Ray listens on the loopback address only, and asks for a token that this run alone has.
    Its folder lies in one that only this user may enter, since Ray opens its own to everybody. When
    the run ends, however it ends, what is left of both is ended and removed.
    """
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=_place())
    with _swept(folder), _loopback(), _own_token(Path(folder) / "token"):
        yield f"{folder}/r"


def is_private() -> bool:
    """Ray was started by this run, for itself."""
    return not ray_constants.ENABLE_RAY_CLUSTER


def kept_logs() -> Path:
    """Where the last of Ray's logs are, of runs that did not end in order."""
    return cache_folder() / "ray-logs"


def _place() -> str:
    """RAY_TMPDIR if the user has set it, else the system's if Ray's sockets fit there."""
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
        start_new_session=True,  # Ctrl-C ends a terminal's whole foreground group
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
    """Ray has this for systems whose firewall asks the user; ``_node_ip_address`` cannot say it."""
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
    Config.initialize("")  # Ray has read the variables already, and the token
    AuthenticationTokenLoader.instance().reset_cache()
