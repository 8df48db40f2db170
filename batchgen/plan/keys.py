"""The keys of rows: names that are unique, and safe as file names."""

from __future__ import annotations

import hashlib
import re

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_CHANGED = re.compile(r"(^|-)x[0-9a-f]{20}$")
_MAX_KEY = 100


def safe_key(value: str | bytes) -> str:
    """Turn a value into a key that can be a file name: letters, digits, ``_`` and ``-``.

    The key of a value that has to be changed, or that looks like a changed one, ends in ``x`` and
    20 hexadecimal digits of its SHA-256, so two values never get the same key. Text that is not
    UTF-8 is passed as bytes.
    """
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    text = value if isinstance(value, str) else value.decode(errors="replace")
    cleaned = _UNSAFE.sub("-", text).strip("-")[:_MAX_KEY]
    if text and cleaned == value and not _CHANGED.search(text):
        return text
    digest = "x" + hashlib.sha256(data).hexdigest()[:20]
    return f"{cleaned}-{digest}" if cleaned else digest


def null_key(row: str) -> str:
    """Make the key of a row whose key is null, from the row's place; no text can give this key."""
    digest = hashlib.blake2b(row.encode(), digest_size=10, person=b"null key").hexdigest()
    return f"null-key-{row}-x{digest}"


def is_safe(key: str) -> bool:
    """Whether a key has only the characters that ``safe_key`` allows."""
    return bool(key) and not _UNSAFE.search(key)


def row_key(file_name: str, row: int) -> str:
    """Make the key of a row without a key column, from its file and its place in the file."""
    return f"{safe_key(file_name.removesuffix('.parquet'))}-{row:08d}"
