"""Sorts the exceptions of stores (retry, stop the job, object missing), and retries operations."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from batchgen.errors import BatchgenError, InputError, RetryShard, StorageFailed

T = TypeVar("T")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_CLIENT_LIBRARIES = {
    *("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "azure", "fsspec"),
    *("requests", "httpx", "huggingface_hub", "urllib3"),
}
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 8.0

# Code of an S3 or Azure error -> what the user has to do.
_REMEDIES = {
    # answers to HEAD have no body, so only the status is known
    "400": "the store refuses the request: check the token (expired?), the region and the endpoint",
    "401": "the store refuses the credentials: check them",
    "403": "permission denied: check the credentials and their rights",
    "AccessDenied": "access denied: check the bucket's policy and the rights of the credentials",
    "AccountProblem": "the account has a problem: ask its owner",
    "AllAccessDisabled": "the bucket's owner has disabled access: ask the owner",
    "AccountIsDisabled": "the store has disabled the account: ask its owner",
    "AuthenticationFailed": "the store refuses the credentials: check AZURE_STORAGE_* and clock",
    "AuthorizationFailure": "access denied: check the roles of the credentials",
    "AuthorizationPermissionMismatch": "access denied: check the roles of the credentials",
    "ContainerNotFound": "the container does not exist: create it, or check its name and account",
    "ExpiredToken": "get a new session token, then resume",
    "InvalidAccessKeyId": "the store does not know the key: check AWS_ACCESS_KEY_ID or the profile",
    "InvalidToken": "get a new session token, then resume",
    "NoSuchBucket": "the bucket does not exist: create it, or check its name, region and endpoint",
    "QuotaExceeded": "the quota is used up: free some space, then resume",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, then resume",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY or the profile",
    "TokenRefreshRequired": "get a new session token, then resume",
}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Sort a store's exceptions: FileNotFoundError passes, refusals stop, all others are retried.

    Args:
        doing: the operation, as in "cannot {doing}".
    """
    try:
        yield
    except BatchgenError:
        raise
    except Exception as error:
        found = _sorted_error(doing, error)
        if found is None:
            raise
        raise found from error


def _sorted_error(doing: str, error: Exception) -> BatchgenError | None:
    """Return the batchgen error for an exception; None if it is raised as it is."""
    code = error_code(error)
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if code in _REMEDIES:
        return StorageFailed(f"cannot {doing}: {code}; {_REMEDIES[code]}")
    if code == "NoSuchUpload":  # aborted, or completed with a lost answer
        return RetryShard(f"cannot {doing}: {said}")
    if isinstance(error, FileNotFoundError | FileExistsError):
        return None
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return InputError(f"cannot {doing}: {error.strerror}: {error.filename}")
    if isinstance(error, PermissionError):
        return StorageFailed(
            f"cannot {doing}: permission denied; check the credentials and rights ({error})"
        )
    if isinstance(error, OSError):
        if error.errno == errno.EROFS:
            return StorageFailed(
                f"cannot {doing}: {os.strerror(errno.EROFS)}; mount it for writing, or use "
                "another output"
            )
        if error.errno in _NO_SPACE:
            return StorageFailed(
                f"cannot {doing}: {os.strerror(error.errno or 0)}; free some space, then run it "
                "again"
            )
        return RetryShard(f"cannot {doing}: {said}")
    if not _is_clients(error):
        return None
    name = type(error).__name__
    if "Credential" in name or "Token" in name or name == "ProfileNotFound":
        return StorageFailed(f"cannot {doing}: {error}; check the credentials")
    return RetryShard(f"cannot {doing}: {said}")  # client libraries have their own classes


def _is_clients(error: Exception) -> bool:
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return any(kind in _CLIENT_LIBRARIES for kind in kinds)


def error_code(error: BaseException | None) -> str:
    """Find the error code of the store's answer in the chain of exceptions; empty if none."""
    while error is not None:
        named = getattr(error, "error_code", None)  # Azure's
        if named:
            return str(getattr(named, "value", named))
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            code = (response.get("Error") or {}).get("Code")
            return str(code or "")
        error = error.__cause__ or error.__context__
    return ""


def persist(doing: str, call: Callable[[], T], patience_s: float) -> T:
    """Call, and retry with back-off for ``patience_s`` and one more try, while faults may pass.

    Raises:
        FileNotFoundError, FileExistsError: from the store.
        StorageFailed: the store refuses, or the fault did not pass.
    """
    deadline = time.monotonic() + patience_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            with storage_errors(doing):
                return call()
        except RetryShard as error:
            if time.monotonic() + pause_s > deadline:
                raise StorageFailed(
                    f"{error}; retried for {patience_s:g} s: the store is overloaded or "
                    "unreachable; resume when it answers again"
                ) from error
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
