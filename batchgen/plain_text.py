"""Text that a terminal only shows: names from data could else set its title or clear its screen."""

from __future__ import annotations

import re

# What a terminal acts on (C0 but line feed and tab, DEL, C1), what reorders or breaks a line (the
# bidirectional overrides and isolates, U+2028 and U+2029), and what is in no encoding (surrogates).
_ACTIVE = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BYTES = range(0xDC80, 0xDD00)  # of a file name that is not UTF-8, as Python keeps them


def plain(text: str) -> str:
    """The text with every character that a terminal would act on shown as its escape, ``\\x1b``."""
    return _ACTIVE.sub(lambda found: _escape(ord(found[0])), text)


def short(text: str, letters: int = 300) -> str:
    """The text on one line, cut where it is longer than so many letters."""
    words = " ".join(text[: 2 * letters].split())
    if len(words) <= letters and len(text) <= 2 * letters:
        return words
    return f"{words[: letters - 1]}…"


def _escape(code: int) -> str:
    if code in _BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
