"""Fetches conditioning images that rows name by URI, from the places that the spec allows."""

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
_AT_HOST = re.compile(r"://[^/]*@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_GLOB = re.compile(r"[*?\[]")
_LONGEST_SHOWN = 200
_WEB = ("http://", "https://")
# Stores of the job. Their faults stop the job or retry the shard; those of other hosts reject the
# row, since anyone's server may be down.
_OWN = ("/", "s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://")

AT_ONCE = 8  # number of quick fetches at a time
SLOW_S = 2.0  # a fetch that takes longer than this no longer counts as quick
MOST_AT_ONCE = 64  # number of fetches at a time, slow ones included
_LOOK_S = 1.0


@dataclass(frozen=True)
class Uris:
    """Where URIs may point, and the limits of what is read.

    Attributes:
        base: the folder that relative URIs start from: that of the input.
        roots: folders, buckets (``s3://bucket``) or complete schemes (``https://``).
        limit_bytes: larger objects are rejected.
        timeout_s: objects that take longer are rejected.
    """

    base: str
    roots: tuple[str, ...]
    limit_bytes: int
    timeout_s: float

    def fetch(
        self, uris: Iterable[str], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[str, bytes | RejectRow]:
        """Fetch each URI's bytes, or the reason why its row is rejected; several at a time.

        A URI's time starts with its request, and slow ones do not delay the others: n URIs take at
        most ``timeout_s`` for each ``MOST_AT_ONCE`` of them.

        Args:
            meanwhile: called about once a second, so that the watchdog sees that the replica is
                not stuck.

        Raises:
            StorageFailed: a store refuses every request, or its faults did not pass.
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
                    found[uri] = self._too_slow(uri)
                else:
                    continue
                del asked[future]
            if now - looked >= _LOOK_S:
                looked = now
                meanwhile()
        return found

    def _fetch(self, uri: str) -> bytes:
        """Read one URI. A fault of this URI rejects its row only."""
        if _INLINE.match(uri):
            return self._bounded(uri, _inline_bytes(uri))
        place = self.place(uri)
        try:
            data = read_limited(place, self.limit_bytes, self._may_follow, self.timeout_s)
        except FileNotFoundError:
            raise _reject("missing-uri", uri, "there is no such object") from None
        except TimeoutError:
            raise self._too_slow(uri) from None
        except Denied as error:
            raise _reject("denied-uri", uri, f"access is denied ({_said(error, place)})") from None
        except (InputError, ValueError) as error:
            raise _reject("bad-uri", uri, f"it cannot be read ({_said(error, place)})") from None
        except (StorageFailed, RetryShard, OSError) as error:
            if place.startswith(_OWN) and not isinstance(error, OSError):
                raise
            what = f"its host does not answer properly ({_said(error, place)})"
            raise _reject("unreachable-uri", uri, what) from None
        return self._bounded(uri, data)

    def _too_slow(self, uri: str) -> RejectRow:
        what = f"it was not read within {self.timeout_s:g} s (input.uri_timeout_s)"
        return _reject("uri-timeout", uri, what)

    def _bounded(self, uri: str, data: bytes) -> bytes:
        if len(data) > self.limit_bytes:
            what = f"it has more than {self.limit_bytes} bytes (input.uri_limit_bytes)"
            raise _reject("large-uri", uri, what)
        return data

    def _may_follow(self, uri: str) -> None:
        """Refuse redirects to places that are not under the roots."""
        if not uri.startswith(_WEB) or self.place(uri) != uri:
            raise _reject("forbidden-uri", uri, f"a redirect to it is not allowed; {self._allowed}")

    @property
    def _allowed(self) -> str:
        return f"allowed: URIs under {', '.join(self.roots)} (input.uri_roots)"

    def place(self, uri: str) -> str:
        """Make the URI absolute.

        Raises:
            RejectRow: ``bad-uri`` when it is malformed, ``forbidden-uri`` when it is under none of
                the roots.
        """
        whole = uri.removeprefix("file://")
        if not _SCHEME.match(whole) and not whole.startswith("/"):
            whole = f"{self.base}/{whole}"
        _refuse_malformed(uri, whole)
        if "::" in whole or _AT_HOST.search(whole) or "%2e" in whole.lower():
            what = f"it has '::', a user, or an encoded dot; {self._allowed}"
            raise _reject("forbidden-uri", uri, what)
        whole = _normal(whole)
        if not any(_is_under(whole, root) for root in self.roots):
            raise _reject("forbidden-uri", uri, f"it is not in an allowed place; {self._allowed}")
        return whole


def _has_room(asked_since: list[float]) -> bool:
    """Whether another fetch may start."""
    now = time.monotonic()
    quick = sum(now - since < SLOW_S for since in asked_since)
    return quick < AT_ONCE and len(asked_since) < MOST_AT_ONCE


def _begun(call: Callable[[str], bytes], uri: str) -> Future[bytes]:
    """Run the call in a daemon thread, since a stuck one must not delay the end of the program."""
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
    """Decode a ``data:`` URI (RFC 2397)."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise _reject("bad-uri", uri, "it has no comma; needed: data:image/png;base64,DATA")
    data = unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return data
    try:
        data = b"".join(data.split()).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise _reject("bad-uri", uri, f"its data is not base64 ({error})") from None


def _refuse_malformed(uri: str, whole: str) -> None:
    """Refuse URIs that no library accepts, or that some would read as another address."""
    is_url = _SCHEME.match(whole) is not None
    if "\0" in whole or (is_url and _CONTROL.search(whole)):
        raise _reject("bad-uri", uri, "it contains control characters")
    if whole.lower().startswith(_WEB):
        try:
            parts = urlsplit(whole)
            is_whole = bool(parts.hostname) and parts.port != 0
        except ValueError as error:
            what = f"it is not of the form https://host/path ({error})"
            raise _reject("bad-uri", uri, what) from None
        if not is_whole:
            raise _reject("bad-uri", uri, "it is not of the form https://host/path")


def uris_of(spec: Spec) -> Uris:
    """Read the allowed places from a spec; by default the input's own bucket, or local folder."""
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
    """Remove ``..`` and doubled slashes; local links are resolved, so that none leads outside."""
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
    """Whether the path stays in its folder, however often a server decodes it."""
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


def _reject(reason: str, uri: str, what: str) -> RejectRow:
    return RejectRow(reason, f"URI {_shown(uri)!r}: {what}")


def _shown(uri: str) -> str:
    """Show a URI without its secrets, and shortened, since a ``data:`` URI may hold megabytes."""
    text = redact(uri[: 10 * _LONGEST_SHOWN])
    if len(text) <= _LONGEST_SHOWN and len(uri) <= 10 * _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(uri)} characters)"


def _said(error: Exception, place: str) -> str:
    """Return an error's first line, without the URI, which the message names, and secrets."""
    text = str(error).replace(place, "it").partition("\n")[0]
    return redact(text)[: 2 * _LONGEST_SHOWN]
