"""Ray's token: who has it runs code as the owner of the cluster, so its file is for one user."""

from __future__ import annotations

import os
from pathlib import Path

PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
FOR_OTHERS = 0o077


def token_file() -> Path:
    """Where Ray looks for the token of a cluster that it joins."""
    return Path(os.environ.get(PATH_VARIABLE) or Path.home() / ".ray" / "auth_token")


def is_open(path: Path) -> bool:
    """The file is there, and others than its owner may read it."""
    try:
        return bool(path.stat().st_mode & FOR_OTHERS)
    except OSError:
        return False


def close_token() -> None:
    """Take the token's file from other users: Ray writes it with the mode 0644."""
    path = token_file()
    if is_open(path) and path.stat().st_uid == os.getuid():
        path.chmod(0o600)
