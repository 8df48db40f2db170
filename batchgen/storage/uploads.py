"""Multipart uploads of S3: uploads large objects in parts; finds and aborts unfinished uploads."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from batchgen.errors import BatchgenError, RetryShard, StorageFailed
from batchgen.storage.connect import limits
from batchgen.storage.faults import error_code

if TYPE_CHECKING:
    from batchgen.storage.store import Store

OWN_FOLDERS = ("data/", "_batchgen/")
PARTS_AT_ONCE = 4  # each is a copy in memory
UPLOADS_BEGUN = 3  # uploads tried for one object, if one is gone or cannot be completed
COMPLETE_WITHIN_S = 10.0  # a gateway that dies while completing keeps a lock (Ceph: 10 minutes)


class _UploadGone(StorageFailed):
    """The multipart upload is gone or cannot be completed; a new upload may succeed."""


def put_in_parts(store: Store, name: str, data: bytes) -> None:
    """Write or replace one S3 object in parts of ``Limits.part_bytes``, visible when complete.

    Each request is retried by itself. If one part fails, the upload is aborted after all parts in
    flight have ended: the store would keep a part that arrives after the abort.

    Raises:
        StorageFailed, RetryShard: as ``Store.put``; the upload is aborted, if the store answers.
    """
    for begun in range(UPLOADS_BEGUN):
        try:
            _Parts(store, name, data).upload()
            return
        except _UploadGone:
            if begun == UPLOADS_BEGUN - 1:
                raise


class _Parts:
    """One upload of one object."""

    def __init__(self, store: Store, name: str, data: bytes) -> None:
        self.store, self.name, self.data = store, name, data
        self.bucket, _, self.key = store.path(name).partition("/")
        self.part = limits().part_bytes
        self.doing = f"write {store.url}/{name}"
        self.place: dict[str, Any] = {}
        self.failed: Exception | None = None  # of the part that failed first

    def upload(self) -> None:
        answer = self._ask("create_multipart_upload", Bucket=self.bucket, Key=self.key)
        self.place = {"Bucket": self.bucket, "Key": self.key, "UploadId": answer["UploadId"]}
        numbers = range(1, -(-len(self.data) // self.part) + 1)
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE, "upload") as pool:  # waits for all of them
                parts = list(pool.map(self._send, numbers))
            self._complete(parts)
        except BaseException:
            with contextlib.suppress(BatchgenError, OSError):
                _abort(self.store.without_retries(), self.place, self.doing)
            raise

    def _send(self, number: int) -> dict[str, Any]:
        body = self.data[(number - 1) * self.part : number * self.part]
        try:
            answer = self._ask("upload_part", **self.place, PartNumber=number, Body=body)
        except Exception as error:
            self.failed = self.failed or error
            raise self.failed from None
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(self, parts: list[dict[str, Any]]) -> None:
        patience_s = min(self.store.patience_s, COMPLETE_WITHIN_S)
        hasty = replace(self.store, patience_s=patience_s)
        whole = {"MultipartUpload": {"Parts": parts}}
        try:
            self._ask("complete_multipart_upload", hasty, **self.place, **whole)
        except _UploadGone:  # also the answer to a retry if the answer to a success was lost
            with contextlib.suppress(FileNotFoundError):
                there = self._ask("head_object", Bucket=self.bucket, Key=self.key)
                if there["ETag"].strip('"') == _etag_of(parts):
                    return
            raise
        except StorageFailed as error:
            if isinstance(error.__cause__, RetryShard):
                raise _UploadGone(str(error)) from error
            raise

    def _ask(self, method: str, store: Store | None = None, **words: Any) -> dict[str, Any]:
        """Send one request, with a store's retries and the time limit of a put."""
        from fsspec.asyn import sync

        fs = self.store.fs
        within_s = limits().write_within_s(len(words.get("Body", b"")))

        def call() -> dict[str, Any]:
            if self.failed is not None:
                raise self.failed
            try:
                answer: dict[str, Any] = sync(
                    fs.loop, fs._call_s3, method, timeout=within_s, **words
                )
            except Exception as error:
                if error_code(error) == "NoSuchUpload":
                    raise _UploadGone(
                        f"cannot {self.doing}: the upload is gone; does another run or a clean-up "
                        "job abort uploads?"
                    ) from error
                raise
            return answer

        return (store or self.store).attempt(self.doing, call)


def _etag_of(parts: list[dict[str, Any]]) -> str:
    """Compute S3's etag of a multipart object: the MD5 of its parts' MD5s, and their number."""
    digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f"{hashlib.md5(digests).hexdigest()}-{len(parts)}"


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was neither completed nor aborted."""

    name: str
    bucket: str
    key: str
    upload_id: str
    started: str


def unfinished_uploads(store: Store) -> list[Upload]:
    """List the unfinished uploads under the store's ``data/`` and ``_batchgen/`` (S3 only).

    Google and Azure delete uncompleted uploads by themselves.
    """
    if "s3" not in store.fs.protocol:
        return []
    return [upload for upload in _uploads(store) if upload.name.startswith(OWN_FOLDERS)]


def abort(store: Store, upload: Upload) -> None:
    """Abort an upload, if it still exists."""
    place = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
    _abort(store, place, f"abort the unfinished upload of {store.url}/{upload.name}")


def _abort(store: Store, place: dict[str, str], doing: str) -> None:
    def call() -> None:
        with contextlib.suppress(FileNotFoundError):
            store.fs.call_s3("abort_multipart_upload", **place)

    store.attempt(doing, call)


def _uploads(store: Store) -> Iterator[Upload]:
    bucket, _, root = store.root.partition("/")
    prefix = f"{root}/" if root else ""
    marker: dict[str, str] = {}
    while True:
        page = store.attempt(f"list uploads of {store.url}", partial(_page, store, prefix, marker))
        for one in page.get("Uploads") or []:
            key = one["Key"]
            name = key.removeprefix(prefix)
            yield Upload(name, bucket, key, one["UploadId"], str(one.get("Initiated", "")))
        if not page.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page["NextUploadIdMarker"],
        }


def _page(store: Store, prefix: str, marker: dict[str, str]) -> dict[str, Any]:
    bucket = store.root.partition("/")[0]
    page: dict[str, Any] = store.fs.call_s3(
        "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
    )
    return page
