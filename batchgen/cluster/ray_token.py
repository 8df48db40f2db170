"""Protects Ray's token file: whoever can read it can run code as the owner of the cluster."""

from __future__ import annotations

import os
from pathlib import Path

PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
FOR_OTHERS = 0o077


def token_file() -> Path:
    """The file in which Ray looks for the token of a cluster that it joins."""
    return Path(os.environ.get(PATH_VARIABLE) or Path.home() / ".ray" / "auth_token")


def is_open(path: Path) -> bool:
    """Whether the file exists and users other than its owner may read or write it."""
    try:
        return bool(path.stat().st_mode & FOR_OTHERS)
    except OSError:
        return False


def close_token() -> None:
    """Make the token file private to its owner: Ray writes it with mode 0644."""
    path = token_file()
    if is_open(path) and path.stat().st_uid == os.getuid():
        path.chmod(0o600)
