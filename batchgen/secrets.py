"""Finds secrets in URLs and removes secrets from messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote_plus

_SHORTEST = 6  # redacting shorter values would hide words of ordinary messages
_VARIABLE = re.compile(r"secret|token|passw|account_key|sas|connection_string", re.IGNORECASE)
_KNOWN: set[str] = set()  # values of the variables that the options in use refer to

# User and password before an @, which may be percent-encoded by mistake. They are in the host's
# place, or, after a colon that begins no port, in everything before the @, since secret keys may
# hold slashes.
_USERINFO = re.compile(
    r"(://)(?:[^\s'\"@:/?#]*:(?!:)(?!\d*(?:[/?#\s'\"]|$))[^\s'\"]*@|[^\s'\"/?#]*(?:@|%40))"
)
_REST = (
    r"[^\s'\"]*?(?=[:;,.)]?(?:[\s'\"]|$))"  # the rest of a URL, without the punctuation after it
)
_WEB = re.compile(rf"(\bhttps?://[^\s'\"?#]*)[?#]{_REST}", re.IGNORECASE)
# In other schemes a ? may belong to a glob, so a query needs NAME= after it.
_QUERY = re.compile(rf"(\w://[^\s'\"]*?)[?&#;][\w.%~-]+={_REST}")
_HARMLESS_PARAMETERS = (
    *("branch", "dl", "download", "format", "generation", "lang", "page", "raw", "ref", "rev"),
    *("revision", "snapshot", "variant", "version", "versionid", "version_id"),
)
_HARMLESS_VALUE = re.compile(r"|true|false|\d{1,3}", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Remove user, password and query from a URL, or from the URLs in a message."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1", _WEB.sub(r"\1", _USERINFO.sub(r"\1", text)))


def redact(text: str) -> str:
    """Remove the secrets that this process knows, and those that URLs in the text may hold."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    return without_secrets(text)


def remember(secrets: Iterable[str]) -> None:
    """Replace the set of secrets that the store options refer to."""
    _KNOWN.clear()
    _KNOWN.update(secrets)


def secret_in(place: str) -> str | None:
    """Name what may be a secret in a path, a URL or a ``::`` chain of them; None if nothing is."""
    for url in place.split("::"):
        scheme, mark, rest = url.partition("://")
        host = re.split("[/?#]", rest, maxsplit=1)[0]
        _, colon, port = host.partition(":")
        if mark and ("@" in unquote_plus(host) or (colon and not port.isdigit() and "@" in rest)):
            return "a user or a password"
        is_web = scheme.strip().lower() in ("http", "https")
        begin = re.search(r"[?#]" if is_web else r"[?&#;][\w.%~-]+=", rest)
        parameters = re.split("[?#&;]", rest[begin.start() :]) if mark and begin else ()
        if not all(map(_is_harmless, parameters)):
            return "a query that may hold a secret"
    return None


def _is_harmless(parameter: str) -> bool:
    name, mark, value = parameter.partition("=")
    if not mark:
        return name == ""
    return name.lower() in _HARMLESS_PARAMETERS or bool(
        _HARMLESS_VALUE.fullmatch(unquote_plus(value))
    )


def _known() -> set[str]:
    found = {value for name, value in os.environ.items() if _VARIABLE.search(name)}
    return {one for one in found | _KNOWN if len(one) >= _SHORTEST}
