"""Reads one object from a web server, and never reads or unpacks more bytes than requested."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

from batchgen.errors import InputError

MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)
_DENIED = (401, 402, 403, 407, 451)
_PACKED = ("gzip", "x-gzip", "deflate")
_EITHER_HEADER = zlib.MAX_WBITS | 32  # zlib's or gzip's


class Denied(InputError):
    """Access to this one object is denied."""


async def get(fs: Any, url: str, most: int, follow: Callable[[str], object]) -> bytes:
    """Read up to ``most`` bytes of an object, unpacked.

    Args:
        fs: fsspec's filesystem for HTTP.
        follow: called with the target of every redirect; raises if the target is not allowed.

    Raises:
        FileNotFoundError: there is no such object.
        InputError: the server refuses, or its answer cannot be unpacked.
    """
    session = await fs.set_session()
    options = {**fs.kwargs, "allow_redirects": False, "auto_decompress": False}
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
    for _ in range(MOST_REDIRECTS + 1):
        async with session.get(fs.encode_url(url), **options) as answer:
            if "Location" in answer.headers and answer.status in _REDIRECTS:
                url = urljoin(url, answer.headers["Location"])
                follow(url)
                continue
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            if 400 <= answer.status < 500 and answer.status not in _MAY_PASS:
                kind = Denied if answer.status in _DENIED else InputError
                raise kind(f"the server answers {answer.status} {answer.reason}")
            answer.raise_for_status()
            return await _body(answer, most)
    raise InputError(f"the server redirects more than {MOST_REDIRECTS} times")


async def _body(answer: Any, most: int) -> bytes:
    packing = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in (*_PACKED, "identity", ""):
        raise InputError(
            f"the server's answer has the encoding {packing}, although the request excludes it"
        )
    unpack = zlib.decompressobj(_EITHER_HEADER) if packing in _PACKED else None
    data = bytearray()
    async for chunk in answer.content.iter_chunked(1 << 16):
        try:
            data += chunk if unpack is None else unpack.decompress(chunk, most - len(data))
        except zlib.error as error:
            raise InputError(f"the server's answer cannot be unpacked: {error}") from error
        if len(data) >= most:
            break
    return bytes(data[:most])
