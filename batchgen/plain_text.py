"""Escapes control characters: names from data could set a terminal's title or clear its screen."""

from __future__ import annotations

import re

# Characters that a terminal acts on (C0 except line feed and tab, DEL, C1), that reorder or break a
# line (the bidirectional overrides and isolates, U+2028, U+2029), or that cannot be encoded
# (surrogates).
_ACTIVE = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BYTES = range(0xDC80, 0xDD00)  # Python's surrogates for bytes of a file name that is not UTF-8


def plain(text: str) -> str:
    """Replace every character that a terminal would act on by its escape, such as ``\\x1b``."""
    return _ACTIVE.sub(lambda found: _escape(ord(found[0])), text)


def short(text: str, letters: int = 300) -> str:
    """Put the text on one line of at most ``letters`` characters; a longer one ends with ``…``."""
    words = " ".join(text[: 2 * letters].split())
    if len(words) <= letters and len(text) <= 2 * letters:
        return words
    return f"{words[: letters - 1]}…"


def _escape(code: int) -> str:
    if code in _BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
