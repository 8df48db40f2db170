"""The table of classes: id, name, synonyms, definition and more, joined to rows by their label."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, nearest, shown
from batchgen.recipes.reasons import Refused
from batchgen.recipes.sources import Source, listed_source, parquet_source
from batchgen.storage import find_files, open_input

MAX_CLASSES = 1_000_000
MAX_BYTES = 256 << 20
LISTS = ("synonyms", "hypernyms", "attributes", "backgrounds")


class Classes:
    """Finds the class of a label: by its id if the label is a number, else by its name.

    Args:
        rows: one mapping for each class, with ``name`` and perhaps ``id``; None if there is no
            table, so that a class has only what the label says.
        names: the names of the source's labels, if these are numbers of a ClassLabel.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]] | None, names: Sequence[str] | None
    ) -> None:
        self.rows = rows
        self._names = names
        self._by_id = {one["id"]: one for one in rows or () if one.get("id") is not None}
        self._by_name = {one["name"]: one for one in rows or ()}

    def of(self, label: Any) -> Mapping[str, Any] | None:
        """Return the class of a label: a mapping with at least ``name``; None for a null label.

        Raises:
            Refused: the table has no such class.
        """
        if label is None:
            return None
        name = self._name(label)
        if self.rows is None:
            number = {"id": label} if isinstance(label, int) else {}
            return {**number, "name": str(label) if name is None else name}
        found = self._by_id.get(label) if name is None or not self._by_name else None
        found = found or self._by_name.get(name) or self._by_id.get(label)
        if found is None:
            near = nearest(str(label), map(str, self._by_name))
            raise Refused("unknown-class", f"label {label!r} is not in the table of classes{near}")
        return found

    def _name(self, label: Any) -> Any:
        """The name of a label, or None if it is a number without a name."""
        if isinstance(label, str):
            return label
        if self._names and isinstance(label, int) and 0 <= label < len(self._names):
            return self._names[label]
        return None

    def source(self, key: str | None) -> Source:
        """Make one row of each class, for a recipe without other rows."""
        assert self.rows is not None
        ids = [one.get("id") for one in self.rows]
        numbered = all(isinstance(one, int) for one in ids)
        rows = [
            {"name": one["name"], "label": one["id"] if numbered else one["name"]}
            for one in self.rows
        ]
        return listed_source(rows, key, "classes")


def read_classes(
    given: str | Sequence[Any] | Mapping[str, Any] | None, names: Sequence[str] | None
) -> Classes:
    """Read the table of classes of a recipe.

    Raises:
        InputError: it cannot be read, a class has no name, or a name or id occurs twice.
    """
    if given is None:
        return Classes(None, names)
    rows = list(map(_row, _rows(given)))
    seen: dict[tuple[str, Any], int] = {}
    for number, row in enumerate(rows):
        if not isinstance(row.get("name"), str) or not row["name"].strip():
            raise InputError(f"classes: class {number} has no name, which must be text")
        for column in ("name", "id"):
            value = row.get(column)
            if value is None:
                continue
            if not isinstance(value, int | str):
                needed = "a whole number or text"
                raise InputError(f"classes: class {number} has {column} {shown(value)}; {needed}")
            other = seen.setdefault((column, value), number)
            if other != number:
                raise InputError(
                    f"classes: classes {other} and {number} have the same {column} {value!r}"
                )
    return Classes(rows, names)


def _rows(given: str | Sequence[Any] | Mapping[str, Any]) -> list[dict[str, Any]]:
    if isinstance(given, str):
        rows = _csv(given) if given.lower().endswith(".csv") else _parquet(given)
    elif isinstance(given, Mapping):
        rows = [_of_mapping(name, value) for name, value in given.items()]
    else:
        rows = [{"name": one} if isinstance(one, str) else one for one in given]
    for number, one in enumerate(rows):
        if not isinstance(one, Mapping):
            needed = "a name, or a mapping with name"
            raise InputError(f"classes: class {number} is {shown(one)}; needed: {needed}")
    if not 0 < len(rows) <= MAX_CLASSES:
        raise InputError(f"classes: {len(rows):,} classes; allowed: 1 to {MAX_CLASSES:,}")
    return [dict(one) for one in rows]


def _of_mapping(name: str, value: Any) -> dict[str, Any]:
    """Read ``name: {...}``, ``name: [synonyms]``, ``name: definition`` or ``name:``."""
    if isinstance(value, Mapping):
        return {"name": name, **value}
    if isinstance(value, list | tuple):
        return {"name": name, "synonyms": list(value)}
    return {"name": name} if value is None else {"name": name, "definition": str(value)}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Make lists of texts such as ``cat; kitty``, and a number of the id."""
    made = dict(row)
    for name in LISTS:
        value = made.get(name)
        if isinstance(value, str):
            made[name] = [one.strip() for one in value.split(";") if one.strip()]
    number = made.get("id")
    if isinstance(number, str) and number.strip().lstrip("-").isdigit():
        made["id"] = int(number)
    return made


def _parquet(path: str) -> list[dict[str, Any]]:
    source = parquet_source(path)
    if "name" not in source.schema.names:
        raise InputError(f"classes: {path} has no column name")
    rows: list[dict[str, Any]] = []
    for batch in source.batches():
        try:
            rows += batch.table.to_pylist()
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(f"classes: {path} has text that is not UTF-8") from error
        if len(rows) > MAX_CLASSES:
            break
    return rows


def _csv(path: str) -> list[dict[str, Any]]:
    """Read a CSV file with a header; empty cells are null."""
    _, files = find_files(path, ".csv")
    with open_input(files[0].path, path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"classes: {path} is larger than {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"classes: {path} is not CSV in UTF-8: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"classes: {path} row {number} has a wrong number of cells")
    return [{name: value or None for name, value in row.items()} for row in rows]
