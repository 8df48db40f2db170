"""What a store's exceptions mean: try again, stop the job, or there is no such object."""

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

# Code of an S3 or Azure error -> what somebody has to do about it.
_REMEDIES = {
    # answers to HEAD have no body, so no more than the status
    "400": "the store refuses the request: an expired token, a wrong region or endpoint",
    "401": "the store refuses the credentials: check them",
    "403": "permission denied: check the credentials and their rights there",
    "AccessDenied": "the key may not do this there: check the bucket's policy and the key's rights",
    "AccountProblem": "ask the owner of the account",
    "AllAccessDisabled": "the bucket's owner has closed it",
    "AccountIsDisabled": "the store has closed the account: ask its owner",
    "AuthenticationFailed": "the store refuses the credentials: check AZURE_STORAGE_* and clock",
    "AuthorizationFailure": "the credentials may not do this there: check their roles",
    "AuthorizationPermissionMismatch": "the credentials may not do this there: check their roles",
    "ContainerNotFound": "there is no such container: make it, or check its name and account",
    "ExpiredToken": "get a new session token, then resume",
    "InvalidAccessKeyId": "the store knows no such key: check AWS_ACCESS_KEY_ID or the profile",
    "InvalidToken": "get a new session token, then resume",
    "NoSuchBucket": "there is no such bucket: make it, or check its name, region and endpoint",
    "QuotaExceeded": "the quota is used up: free some space, then resume",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, then resume",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY or the profile",
    "TokenRefreshRequired": "get a new session token, then resume",
}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Sort a store's exceptions: FileNotFoundError passes, refusals stop, the rest is retried."""
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
    """The error of ours that it means; None when it passes as it is."""
    code = error_code(error)
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if code in _REMEDIES:
        return StorageFailed(f"cannot {doing}: {code}; {_REMEDIES[code]}")
    if code == "NoSuchUpload":  # completed already, its answer was lost, or was aborted
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
                f"cannot {doing}: {os.strerror(errno.EROFS)}; mount it for writing, or name "
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
    return RetryShard(f"cannot {doing}: {said}")  # clients raise classes of their own


def _is_clients(error: Exception) -> bool:
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return any(kind in _CLIENT_LIBRARIES for kind in kinds)


def error_code(error: BaseException | None) -> str:
    """The code that a store gave with a refusal, somewhere in the chain; empty without one."""
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
    """Do it, again and again while its faults may pass, for ``patience_s`` and one more try.

    Raises:
        FileNotFoundError, FileExistsError: as the store says.
        StorageFailed: it refuses, or the fault did not pass.
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
                    f"{error}; tried for {patience_s:g} s: the store is overloaded or out of "
                    "reach; resume when it answers again"
                ) from error
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
