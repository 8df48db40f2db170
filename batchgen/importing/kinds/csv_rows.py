"""CSV and TSV files: a header line, then one row a record."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from functools import partial

from batchgen.errors import InputError
from batchgen.importing.inference import Texts
from batchgen.importing.listing import Listing, lines_of, row_keys
from batchgen.importing.pictures import Pictures
from batchgen.importing.records import Record, dataset_of
from batchgen.importing.rows import Dataset, Kind, Options, Place, Reject

ENDINGS = (".csv", ".tsv")
_LINE_LIMIT_BYTES = 16 << 20
_CELL_LIMIT = 10 << 20  # characters; a quote that is never closed ends here
_DELIMITERS = ",;\t|"
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # UTF-16's first bytes


def fits(listing: Listing) -> bool:
    return listing.has_only(*ENDINGS)


def read(listing: Listing, options: Options) -> Dataset:
    """Read all CSV files of the source, which need the same columns."""
    names = listing.named(*ENDINGS) or list(listing.files)
    heads = {name: header(listing, name) for name in names}
    first = heads[names[0]][0]
    for name, (columns, _) in heads.items():
        if columns != first:
            raise InputError(
                f"{name} has the columns {', '.join(columns)}; {names[0]} has {', '.join(first)}; "
                "all CSV files of a source need the same header"
            )
    pictures = Pictures(listing, options.images, options.image_root)
    delimiters = {name: delimiter for name, (_, delimiter) in heads.items()}
    return dataset_of(partial(_records, listing, delimiters), Texts, pictures)


def header(listing: Listing, name: str) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter.

    Raises:
        InputError: the file is empty, not UTF-8, or its header has an empty or a double name.
    """
    with listing.open(name) as file:
        _, line = next(lines_of(file, _LINE_LIMIT_BYTES), (1, b""))
    if line.startswith(_WIDE):
        raise InputError(f"{name} is UTF-16; save it as UTF-8")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} line 1: the header is not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise InputError(f"{name} line 1: no header; the first line needs the names of columns")
    delimiter = max(_DELIMITERS, key=lambda one: (text.count(one), -_DELIMITERS.index(one)))
    try:
        cells = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"{name} line 1: the header cannot be read: {error}") from error
    columns = [one.strip() for one in cells]
    for number, column in enumerate(columns, start=1):
        if not column:
            raise InputError(f"{name} line 1: column {number} has no name; each column needs one")
        if columns.count(column) > 1:
            raise InputError(f"{name} line 1: two columns are called {column!r}; rename one")
    return columns, delimiter


def _records(listing: Listing, delimiters: dict[str, str]) -> Iterator[Record | Reject]:
    for name, delimiter in delimiters.items():
        yield from rows_of(listing, name, delimiter)


class Lines:
    """The lines of a CSV file, of which those of a damaged record can be read again."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._record.append(line)
        self.number += 1
        return line

    def begin(self) -> int:
        """A record begins; returns the number of its first line."""
        self._record = []
        return self.number + 1

    def only_first(self) -> bool:
        """Give back all lines of the record but its first; returns whether there were any."""
        after = self._record[1:]
        self._again.extendleft(reversed(after))
        self.number -= len(after)
        return bool(after)


def rows_of(listing: Listing, name: str, delimiter: str) -> Iterator[Record | Reject]:
    """The rows of one file. A damaged record is refused by its first line, and the next continues.

    So a quote that is never closed costs one row, not all that follow.
    """
    csv.field_size_limit(_CELL_LIMIT)
    folder, key_of = name.rpartition("/")[0], row_keys(name)
    with listing.open(name) as file:
        lines = Lines(
            line.decode("utf-8", "surrogateescape") + "\n"
            for _, line in lines_of(file, _LINE_LIMIT_BYTES)
        )
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        columns = [one.lstrip("\ufeff").strip() for one in next(reader, [])]
        row = -1
        while True:
            start = lines.begin()
            place = Place(name, f"line {start}")
            try:
                cells = next(reader)
                wrong = _fault(cells, columns, f"{name} line {start}") if cells else None
            except StopIteration:
                return
            except csv.Error as error:
                cells, wrong = ["?"], ("bad-fields", f"{name} line {start}: {error}")
            if not cells:  # an empty line
                continue
            row += 1
            if wrong is not None:
                yield Reject(place, *wrong)
                if lines.only_first() or wrong[0] == "bad-fields":
                    reader = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            yield Record(dict(zip(columns, cells, strict=True)), place, key_of(row), folder=folder)


def _fault(cells: list[str], columns: list[str], where: str) -> tuple[str, str] | None:
    """Reason and message of a record that cannot be a row."""
    if len(cells) != len(columns):
        message = f"{where}: got {len(cells)} fields; allowed: {len(columns)}, as the header has"
        return "bad-fields", message
    if _is_utf8("".join(cells)):
        return None
    column = next(column for column, cell in zip(columns, cells, strict=True) if not _is_utf8(cell))
    return "not-utf8", f"{where}, field {column!r}: it is not UTF-8; allowed: UTF-8"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


KIND = Kind("csv", "CSV or TSV files with a header", fits, read)
