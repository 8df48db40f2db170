"""Conditioning images that rows name by URI, fetched only from where the spec allows."""

from __future__ import annotations

import base64
import os
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from batchgen.errors import InputError, RejectRow, RetryShard, StorageFailed
from batchgen.secrets import redact
from batchgen.spec.spec import Spec
from batchgen.storage import Denied, read_limited

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_INLINE = re.compile(r"^data:", re.IGNORECASE)
_USERINFO = re.compile(r"://[^/]*@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_GLOB = re.compile(r"[*?\[]")
_LONGEST_SHOWN = 200
_WEB = ("http://", "https://")
# Stores of the job's own, whose faults are not the row's; nobody promised anything of other hosts.
_OWN = ("/", "s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://")

AT_ONCE = 8  # fetched at a time ...
SLOW_S = 2.0  # ... but what takes longer than this gives its place to another,
MOST_AT_ONCE = 64  # up to so many in all
_LOOK_S = 1.0


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

    def fetch(
        self, uris: Iterable[str], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[str, bytes | RejectRow]:
        """Each URI's bytes, or why its row is rejected; several at a time.

        A URI's time begins when it is asked for, and those that are slow hold up no other: n URIs
        take ``timeout_s`` for each ``MOST_AT_ONCE`` of them at the very most.

        Args:
            meanwhile: is called again and again, so that nobody takes the wait for a standstill.

        Raises:
            StorageFailed: a store refuses whatever is asked, or its faults did not pass.
            RetryShard: a fault of a disk.
        """
        waiting = deque(dict.fromkeys(uris))
        asked: dict[Future[bytes], tuple[str, float]] = {}
        found: dict[str, bytes | RejectRow] = {}
        looked = time.monotonic()
        while waiting or asked:
            while waiting and _has_room([since for _, since in asked.values()]):
                uri = waiting.popleft()
                asked[_begun(self._fetch, uri)] = uri, time.monotonic()
            wait(asked, timeout=min(_LOOK_S, self.timeout_s / 4), return_when=FIRST_COMPLETED)
            now = time.monotonic()
            for future, (uri, since) in list(asked.items()):
                if future.done():
                    found[uri] = _bytes_or_why(future)
                elif now - since > self.timeout_s:
                    found[uri] = _reject("uri-timeout", uri, f"within {self.timeout_s:g} s")
                else:
                    continue
                del asked[future]
            if now - looked >= _LOOK_S:
                looked = now
                meanwhile()
        return found

    def _fetch(self, uri: str) -> bytes:
        """What the URI names. Whatever is wrong with this one URI is its row's alone."""
        if _INLINE.match(uri):
            return self._bounded(uri, _inline_bytes(uri))
        place = self.place(uri)
        try:
            data = read_limited(place, self.limit_bytes, self._may_follow, self.timeout_s)
        except FileNotFoundError:
            raise _reject("missing-uri", uri, "an object that is there") from None
        except TimeoutError:
            raise _reject("uri-timeout", uri, f"within {self.timeout_s:g} s") from None
        except Denied as error:
            raise _reject("denied-uri", uri, f"what may be read ({_said(error, place)})") from None
        except (InputError, ValueError) as error:
            raise _reject("bad-uri", uri, f"what can be read ({_said(error, place)})") from None
        except (StorageFailed, RetryShard, OSError) as error:
            if place.startswith(_OWN) and not isinstance(error, OSError):
                raise
            what = f"a host that answers ({_said(error, place)})"
            raise _reject("unreachable-uri", uri, what) from None
        return self._bounded(uri, data)

    def _bounded(self, uri: str, data: bytes) -> bytes:
        if len(data) > self.limit_bytes:
            raise _reject("large-uri", uri, f"up to {self.limit_bytes} bytes")
        return data

    def _may_follow(self, uri: str) -> None:
        """Where a web server sends on to has to lie under the roots as well."""
        if not uri.startswith(_WEB) or self.place(uri) != uri:
            raise _reject("forbidden-uri", uri, f"redirects to {', '.join(self.roots)} alone")

    def place(self, uri: str) -> str:
        """The URI made absolute.

        Raises:
            RejectRow: ``bad-uri`` when it is none, ``forbidden-uri`` when it lies under none of the
                roots.
        """
        whole = uri.removeprefix("file://")
        if not _SCHEME.match(whole) and not whole.startswith("/"):
            whole = f"{self.base}/{whole}"
        _refuse_malformed(uri, whole)
        if "::" in whole or _USERINFO.search(whole) or "%2e" in whole.lower():
            raise _reject("forbidden-uri", uri, f"a plain URI under {', '.join(self.roots)}")
        whole = _normal(whole)
        if not any(_is_under(whole, root) for root in self.roots):
            raise _reject("forbidden-uri", uri, f"under {', '.join(self.roots)}")
        return whole


def _has_room(asked_since: list[float]) -> bool:
    """Another may be asked for beside those that are."""
    now = time.monotonic()
    quick = sum(now - since < SLOW_S for since in asked_since)
    return quick < AT_ONCE and len(asked_since) < MOST_AT_ONCE


def _begun(call: Callable[[str], bytes], uri: str) -> Future[bytes]:
    """The call in a thread of its own, which nobody waits for at the end of the program."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(call(uri))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="uri", daemon=True).start()
    return future


def _bytes_or_why(future: Future[bytes]) -> bytes | RejectRow:
    try:
        return future.result()
    except RejectRow as error:
        return error


def _inline_bytes(uri: str) -> bytes:
    """What a ``data:`` URI holds (RFC 2397)."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise _reject("bad-uri", uri, "data:image/png;base64,... or the like")
    data = unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return data
    try:
        data = b"".join(data.split()).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise _reject("bad-uri", uri, f"base64 ({error})") from None


def _refuse_malformed(uri: str, whole: str) -> None:
    """What no library would take, or what some would read as another address."""
    is_url = _SCHEME.match(whole) is not None
    if "\0" in whole or (is_url and _CONTROL.search(whole)):
        raise _reject("bad-uri", uri, "no control characters")
    if whole.lower().startswith(_WEB):
        try:
            parts = urlsplit(whole)
            is_whole = bool(parts.hostname) and parts.port != 0
        except ValueError as error:
            raise _reject("bad-uri", uri, f"https://host/path ({error})") from None
        if not is_whole:
            raise _reject("bad-uri", uri, "https://host/path")


def uris_of(spec: Spec) -> Uris:
    """What a spec allows; by default the input's own bucket, or its own folder on a disk."""
    path = spec.input.path
    pattern = _GLOB.search(path)
    start = path[: pattern.start()] if pattern else path
    is_file = pattern is not None or path.lower().endswith(".parquet") or os.path.isfile(path)
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
    if uri != normal and not uri.startswith(normal + "/"):
        return False
    is_part_of_host = "/" in normal.partition("://")[2]
    return not (uri.startswith(_WEB) and is_part_of_host) or _stays(uri[len(normal) :])


def _stays(rest: str) -> bool:
    """No server that decodes the path, however often, finds another folder in it."""
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    for _ in range(5):
        if "\\" in path or any(part.partition(";")[0] == ".." for part in path.split("/")):
            return False
        decoded = unquote(path)
        if decoded == path:
            return True
        if decoded.count("/") != path.count("/"):
            return False
        path = decoded
    return False


def _reject(reason: str, uri: str, allowed: str) -> RejectRow:
    return RejectRow(reason, f"URI {_shown(uri)!r}; allowed: {allowed}")


def _shown(uri: str) -> str:
    """The URI without its secrets, and shortened: a ``data:`` URI may hold megabytes."""
    text = redact(uri[: 10 * _LONGEST_SHOWN])
    if len(text) <= _LONGEST_SHOWN and len(uri) <= 10 * _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(uri)} characters)"


def _said(error: Exception, place: str) -> str:
    """An error's words, without the address that they are about, and without secrets."""
    text = str(error).replace(place, "it").partition("\n")[0]
    return redact(text)[: 2 * _LONGEST_SHOWN]
