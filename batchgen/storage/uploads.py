"""Multipart uploads that a dead run has left behind: invisible, and paid for by the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchgen.storage.store import Store

OWN_FOLDERS = ("data/", "_batchgen/")


@dataclass(frozen=True)
class Upload:
    """An upload that was begun and neither completed nor aborted."""

    name: str
    bucket: str
    key: str
    upload_id: str
    started: str


def unfinished_uploads(store: Store) -> list[Upload]:
    """Those below the store's ``data/`` and ``_batchgen/``; none where the store has no such thing.

    Google and Azure drop what was not completed by themselves.
    """
    if "s3" not in store.fs.protocol:
        return []
    return [upload for upload in _uploads(store) if upload.name.startswith(OWN_FOLDERS)]


def abort(store: Store, upload: Upload) -> None:
    """Abort it; that it is gone already is fine."""
    doing = f"abort the unfinished upload of {store.url}/{upload.name}"

    def call() -> None:
        place = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
        try:
            store.fs.call_s3("abort_multipart_upload", **place)
        except FileNotFoundError:
            return

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
