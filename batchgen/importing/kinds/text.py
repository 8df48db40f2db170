"""Text files: one prompt a line; or one name of a class a line (kind ``classes``)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.importing.listing import Listing, lines_of, row_keys
from batchgen.importing.rows import KEY, Columns, Dataset, Item, Kind, Options, Place, Reject, Row
from batchgen.plan.keys import safe_key

ENDINGS = (".txt", ".text")
PROMPT = "a photo of a {label}"
_LIMIT_BYTES = 1 << 20
_MOST_CLASSES = 1_000_000


def fits(listing: Listing) -> bool:
    return listing.has_only(*ENDINGS)


def read(listing: Listing, options: Options) -> Dataset:
    """Read prompts; empty lines are no rows."""
    names = listing.named(*ENDINGS) or list(listing.files)
    columns = Columns(pa.schema([("prompt", pa.string())]), parts={KEY: KEY, "prompt": "prompt"})
    return Dataset(columns, _prompts(listing, names), unique=True)


def _prompts(listing: Listing, names: list[str]) -> Iterator[Item]:
    for name in names:
        key_of = row_keys(name)
        for number, text in _lines(listing, name):
            if isinstance(text, Reject):
                yield text
            else:
                yield Row(key_of(number - 1), {"prompt": text}, Place(name, f"line {number}"))


def read_classes(listing: Listing, options: Options) -> Dataset:
    """Read names of classes: one row for each, with its number, name and prompt."""
    template = options.prompt or PROMPT
    if "{label}" not in template:
        raise InputError(f"--prompt is {template!r}; it needs {{label}} for the name of the class")
    found: dict[str, Item] = {}
    refused: list[Item] = []
    for name in listing.files:
        for number, text in _lines(listing, name):
            place = Place(name, f"line {number}")
            if isinstance(text, Reject):
                refused.append(text)
            elif text in found:
                message = f"{name} line {number}: the class {text!r} is there twice"
                refused.append(Reject(place, "duplicate-key", message, safe_key(text)))
            else:
                prompt = template.replace("{label}", text)
                values = {"prompt": prompt, "label": len(found), "class_name": text}
                found[text] = Row(safe_key(text), values, place)
            if len(found) > _MOST_CLASSES:
                raise InputError(f"{name} has more than {_MOST_CLASSES:,} classes")
    kinds = [("prompt", pa.string()), ("label", pa.int64()), ("class_name", pa.string())]
    parts = {KEY: KEY, "prompt": "prompt", "label": "label", "class_label": "class_name"}
    columns = Columns(pa.schema(kinds), {"label": tuple(found)}, parts)
    items = iter([*found.values(), *refused])
    return Dataset(columns, items, unique=True, total=len(found))


def _lines(listing: Listing, name: str) -> Iterator[tuple[int, str | Reject]]:
    """Number and text of each line that is not empty."""
    with listing.open(name) as file:
        for number, line in lines_of(file, _LIMIT_BYTES):
            where, place = f"{name} line {number}", Place(name, f"line {number}")
            if len(line) > _LIMIT_BYTES:
                message = f"{where}: more than {_LIMIT_BYTES:,} bytes; allowed: one prompt a line"
                yield number, Reject(place, "bad-value", message)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, Reject(place, "not-utf8", f"{where}: {error}; allowed: UTF-8")
                continue
            if text:
                yield number, text


KIND = Kind("text", "text files, one prompt a line", fits, read)
CLASSES = Kind("classes", "a text file, one name of a class a line", lambda _: False, read_classes)
