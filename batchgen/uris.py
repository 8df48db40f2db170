"""Conditioning images that rows name by URI, fetched only from where the spec allows."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from dataclasses import dataclass

from batchgen.errors import InputError, RejectRow, StorageFailed
from batchgen.spec import Spec
from batchgen.storage import read_limited

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_USERINFO = re.compile(r"://[^/]*@")
_GLOB = re.compile(r"[*?\[]")
_THREADS = 8
_LONGEST_SHOWN = 200
_OTHERS = ("http://", "https://")  # hosts that nobody promised anything of: theirs is the row


@dataclass(frozen=True)
class Uris:
    """Where URIs may point, and how much of what they name is read.

    Attributes:
        base: what a relative URI starts from: the folder of the input.
        roots: folders, buckets (``s3://bucket``) or whole schemes (``https://``).
        limit_bytes: larger objects are rejected.
        timeout_s: those that take longer are rejected.
    """

    base: str
    roots: tuple[str, ...]
    limit_bytes: int
    timeout_s: float

    def fetch(self, uris: Iterable[str]) -> Mapping[str, bytes | RejectRow]:
        """Each URI's bytes, or why its row is rejected; several at a time.

        Raises:
            StorageFailed: the store refuses, or its faults did not pass.
        """
        wanted = list(dict.fromkeys(uris))
        if not wanted:
            return {}
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="uri")
        try:
            waiting = {uri: pool.submit(self._fetch, uri) for uri in wanted}
            found: dict[str, bytes | RejectRow] = {}
            for uri, future in waiting.items():
                try:
                    found[uri] = future.result(self.timeout_s)
                except TooSlow:
                    found[uri] = _reject("uri-timeout", uri, f"within {self.timeout_s:g} s")
                except RejectRow as error:
                    found[uri] = error
            return found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, uri: str) -> bytes:
        place = self.place(uri)
        try:
            data = read_limited(place, self.limit_bytes, follow=self._may_follow)
        except FileNotFoundError:
            raise _reject("missing-uri", uri, "an object that is there") from None
        except InputError as error:
            raise _reject("bad-uri", uri, str(error)) from None
        except StorageFailed as error:
            if place.startswith(_OTHERS):
                raise _reject("unreachable-uri", uri, f"a host that answers ({error})") from None
            raise
        if len(data) > self.limit_bytes:
            raise _reject("large-uri", uri, f"up to {self.limit_bytes} bytes")
        return data

    def _may_follow(self, uri: str) -> None:
        """Where a web server sends on to has to lie under the roots as well."""
        if not uri.startswith(_OTHERS) or self.place(uri) != uri:
            raise _reject("forbidden-uri", uri, f"redirects to {', '.join(self.roots)} alone")

    def place(self, uri: str) -> str:
        """The URI made absolute.

        Raises:
            RejectRow: ``forbidden-uri`` when it lies under none of the roots.
        """
        whole = uri.removeprefix("file://")
        if not _SCHEME.match(whole) and not whole.startswith("/"):
            whole = f"{self.base}/{whole}"
        if "::" in whole or _USERINFO.search(whole) or "%2e" in whole.lower():
            raise _reject("forbidden-uri", uri, f"a plain URI under {', '.join(self.roots)}")
        whole = _normal(whole)
        if not any(_is_under(whole, root) for root in self.roots):
            raise _reject("forbidden-uri", uri, f"under {', '.join(self.roots)}")
        return whole


def uris_of(spec: Spec) -> Uris:
    """What a spec allows; by default the input's own bucket, or its own folder on a disk."""
    path = spec.input.path
    pattern = _GLOB.search(path)
    start = path[: pattern.start()] if pattern else path
    is_file = pattern is not None or path.endswith(".parquet")
    base = posixpath.dirname(start) if is_file else start.rstrip("/")
    scheme = _SCHEME.match(path)
    if scheme:
        own = scheme.group() + path[scheme.end() :].partition("/")[0]
    else:
        base = own = os.path.abspath(base or ".")
    roots = spec.input.uri_roots
    return Uris(
        base,
        (own,) if roots is None else roots,
        spec.input.uri_limit_bytes,
        spec.input.uri_timeout_s,
    )


def _normal(uri: str) -> str:
    """Without ``..`` and doubled slashes; local links are followed, so that none leads out."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return os.path.realpath(uri)
    head, query, tail = uri[scheme.end() :].partition("?")
    return scheme.group().lower() + posixpath.normpath(head) + query + tail


def _is_under(uri: str, root: str) -> bool:
    if root.endswith("://"):
        return uri.startswith(root.lower())
    normal = _normal(root.removeprefix("file://")).rstrip("/")
    return uri == normal or uri.startswith(normal + "/")


def _reject(reason: str, uri: str, allowed: str) -> RejectRow:
    shown = uri.partition("?")[0][:_LONGEST_SHOWN]
    return RejectRow(reason, f"URI {_USERINFO.sub('://...@', shown)!r}; allowed: {allowed}")
