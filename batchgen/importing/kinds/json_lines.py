"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from batchgen.importing.inference import Kinds
from batchgen.importing.listing import Listing, lines_of, row_keys
from batchgen.importing.pictures import Pictures
from batchgen.importing.records import Record, dataset_of
from batchgen.importing.rows import Dataset, Kind, Options, Place, Refused, Reject

ENDINGS = (".jsonl", ".ndjson")
LINE_LIMIT_BYTES = 64 << 20
_DEPTH = 32


def fits(listing: Listing) -> bool:
    return listing.has_only(*ENDINGS)


def read(listing: Listing, options: Options) -> Dataset:
    """Read all JSON Lines files of the source; a column that a line lacks is null."""
    names = listing.named(*ENDINGS) or list(listing.files)
    pictures = Pictures(listing, options.images, options.image_root)
    return dataset_of(partial(_records, listing, names), Kinds, pictures)


def _records(listing: Listing, names: list[str]) -> Iterator[Record | Reject]:
    for name in names:
        yield from lines_in(listing, name)


def lines_in(listing: Listing, name: str) -> Iterator[Record | Reject]:
    """The rows of one file."""
    folder, key_of = name.rpartition("/")[0], row_keys(name)
    with listing.open(name) as file:
        for number, line in lines_of(file, LINE_LIMIT_BYTES):
            if not line.strip():
                continue
            place = Place(name, f"line {number}")
            try:
                values = parsed(line, f"{name} line {number}")
            except Refused as error:
                yield Reject(place, error.reason, str(error))
                continue
            yield Record(values, place, key_of(number - 1), folder=folder)


def parsed(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Refused: ``not-utf8`` or ``bad-json``: also for NaN, names that occur twice, and more than
            32 levels.
    """
    if len(data) > LINE_LIMIT_BYTES:
        raise Refused("bad-json", f"{where}: more than {LINE_LIMIT_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        text.encode()
        if not isinstance(value, dict):
            raise ValueError(f"got a {type(value).__name__}")
        _refuse_deep(value, _DEPTH)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Refused("not-utf8", f"{where}: {error}; allowed: UTF-8") from error
    except (ValueError, RecursionError) as error:  # with texts of half a surrogate pair
        message = f"{where}: {error}; allowed: one JSON object"
        raise Refused("bad-json", message) from error
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def _refuse_deep(value: Any, levels: int) -> None:
    if levels == 0:
        raise ValueError(f"more than {_DEPTH} levels")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        if isinstance(one, dict | list):
            _refuse_deep(one, levels - 1)


KIND = Kind("jsonl", "JSON Lines files, one object a line", fits, read)
