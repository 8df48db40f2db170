"""Sets of images that are compared or mixed: outputs, Parquet files, and sources of other kinds."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.importing.kinds.choose import about_kinds, kind_of
from batchgen.importing.kinds.parquet import dataset_from
from batchgen.importing.listing import Listing, listed, row_keys
from batchgen.importing.pictures import Pictures
from batchgen.importing.records import LABEL, SPLIT
from batchgen.importing.rows import Later, Options, Refused, Reject, Row
from batchgen.importing.splits import split_in
from batchgen.output.find import contents
from batchgen.output.formats import UNREADABLE, Format, format_of, label_names
from batchgen.output.formats.parquet import Parquet
from batchgen.output.ledger import PLAN, Ledger
from batchgen.output.marker import Marker
from batchgen.plan.columns import plain_table
from batchgen.plan.keys import safe_key
from batchgen.storage import open_store

KEY, PICTURE = "key", "image"
_ROWS = 256  # read at a time
_MASK = ".seg.apng"  # the end of the names of label masks


@dataclass(frozen=True)
class SetRow:
    """One row of a set.

    Attributes:
        key: its name, unique in the set.
        image: the file's bytes, or a struct with ``bytes`` and ``path``; None if not asked for.
        label: the name of its class.
        split: as the set has it.
        file: path or URL of the file that holds the image.
        row: its number in a Parquet file; None if the file is the image.
        more: the values of further columns that were asked for.
    """

    key: str
    image: object = None
    label: str | None = None
    split: str | None = None
    file: str = ""
    row: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


Rows = Callable[[bool, Sequence[str]], Iterator[SetRow]]
Names = Mapping[str, Sequence[str]]  # column -> the names of its class numbers


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        place: path or URL, as given.
        kind: what it is, in a word.
        columns: the names of its columns.
        ledger: if it is an output of batchgen.
        read: reads its rows: with images or without, and with further columns.
        fingerprint: of its files: names, sizes and times; of an output, its markers' files.
        image: the column of its images.
        names: column -> the names of its class numbers, in their order.
    """

    place: str
    kind: str
    columns: tuple[str, ...]
    read: Rows
    fingerprint: str
    ledger: Ledger | None = None
    image: str = PICTURE
    names: Names = field(default_factory=dict)

    @property
    def classes(self) -> Sequence[str]:
        """The names of its classes as it declares them, in the order of their numbers."""
        return self.names.get(LABEL, ())

    @property
    def has_splits(self) -> bool:
        return SPLIT in self.columns

    @property
    def has_labels(self) -> bool:
        return LABEL in self.columns


def set_at(place: str) -> ImageSet:
    """The set of images at a path or URL.

    Raises:
        InputError: there is none, or it has no images.
    """
    if _is_output(place):
        return output_set(Ledger(open_store(place)))
    listing = listed(place)
    if listing.named(".parquet"):
        return _parquet_set(listing)
    kind = kind_of(listing)
    if kind is None:
        raise InputError(
            f"{place}: it is no output of batchgen, has no .parquet file, and is of no other kind "
            f"that has images: {about_kinds()}"
        )
    dataset = kind.read(listing, Options("bytes"))
    image = dataset.columns.parts.get(PICTURE)
    if image is None:
        raise InputError(f"{place} ({kind.name}): it has no images")
    label = dataset.columns.parts.get(LABEL)
    columns = [*dataset.columns.schema.names, *([LABEL] if label else [])]

    def read(with_images: bool, more: Sequence[str]) -> Iterator[SetRow]:
        found = kind.read(listing, Options("bytes"))
        names = found.columns.names
        for item in found.items:
            row = item.row() if isinstance(item, Later) else item
            if isinstance(row, Row):
                yield _of_values(row, image, label, names, more, listing, with_images)
            elif isinstance(row, Reject):
                yield SetRow(row.key or row.place.file, None, file=row.place.file)

    names = {LABEL: dataset.columns.names.get(label or "", ())}
    return ImageSet(place, kind.name, tuple(columns), read, listing.fingerprint, names=names)


def _is_output(place: str) -> bool:
    """Whether batchgen wrote the folder. A file, or a place that cannot be listed, is none."""
    folder, _, name = PLAN.rpartition("/")
    try:
        return name in open_store(place).list(folder)
    except InputError:
        return False


def sources_of(ledger: Ledger) -> Iterator[ImageSet]:
    """The images that the runs of an output read, part by part.

    Raises:
        InputError: a run read none.
    """
    for path, image, key in dict.fromkeys(
        (one.spec.input.path, one.spec.input.columns.image, one.spec.input.columns.key)
        for one in ledger.parts()
    ):
        if image is None:
            raise InputError(
                f"{ledger.store.url}: its run read no images, so there is no input to compare with"
            )
        yield _parquet_set(listed(path), image, key)


def output_set(ledger: Ledger) -> ImageSet:
    """The accepted samples of an output, all parts and committed shards of it.

    Raises:
        InputError: nothing is committed.
    """
    shards = [
        (format_of(plan), marker)
        for plan in ledger.parts()
        for marker in ledger.markers(ledger.states(plan).committed)
    ]
    if not shards:
        raise InputError(f"{ledger.store.url} has no committed shard yet")
    form, marker = next((one for one in shards if one[1].counts.accepted), shards[0])
    schema = form.schema(dict(contents(ledger, marker)))
    digest = hashlib.sha256()
    for _, one in shards:
        digest.update("".join(file.sha256 for file in one.files).encode())

    def read(with_images: bool, more: Sequence[str]) -> Iterator[SetRow]:
        for form, marker in shards:
            yield from _of_shard(ledger, form, marker, with_images, more)

    url = ledger.store.url
    return ImageSet(
        url,
        "output",
        tuple(schema.names),
        read,
        digest.hexdigest(),
        ledger,
        names=_output_names(schema),
    )


def _output_names(schema: pa.Schema) -> Names:
    """Column -> the names of its class numbers, in an output."""
    return {**dataset_from(schema, []).columns.names, LABEL: label_names(schema)}


def _of_shard(
    ledger: Ledger, form: Format, marker: Marker, with_images: bool, more: Sequence[str]
) -> Iterator[SetRow]:
    wanted = {KEY, LABEL, SPLIT, *more, *([PICTURE] if with_images else [])}
    ours = [file.name for file in marker.files if form.is_ours(file.name)]
    if isinstance(form, Parquet) and not with_images:
        with ledger.store.open(ours[0]) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            kept = [one for one in parquet.schema_arrow.names if one in wanted]
            table = parquet.read(kept, use_threads=False)
    else:
        table = form.read(dict(contents(ledger, marker)), wanted)
    one_file = isinstance(form, Parquet)
    files = {} if one_file else {_stem(name): name for name in ours if not name.endswith(_MASK)}
    columns = _Columns(ledger.store.url, _output_names(table.schema))
    for number, row in enumerate(_rows(table, columns, more)):
        own = files.get(row.key)
        url = f"{ledger.store.url.rstrip('/')}/{own or ours[0]}"
        yield _placed(row, url, None if own else number)


def _stem(name: str) -> str:
    return posixpath.basename(name).partition(".")[0]


def _parquet_set(listing: Listing, image: str | None = None, key: str | None = KEY) -> ImageSet:
    """Parquet files with images, as `batchgen import` and Hugging Face write them."""
    names = listing.named(".parquet")
    first = _schema(listing, names[0])
    told = dataset_from(first, []).columns
    image, label = image or told.parts.get(PICTURE), told.parts.get(LABEL)
    if image is None:
        raise InputError(
            f"{listing.source}: no column of images; the columns are {', '.join(first.names)}"
        )
    columns = [*first.names, *([LABEL] if label else [])]
    if SPLIT not in columns and any(split_in(name) for name in names):
        columns.append(SPLIT)
    read = partial(_parquet_rows, listing, (image, label, key))
    classes = {LABEL: told.names.get(label or "", ())}
    return ImageSet(
        listing.source, "parquet", tuple(columns), read, listing.fingerprint, None, image, classes
    )


def _parquet_rows(
    listing: Listing,
    parts: tuple[str, str | None, str | None],
    with_images: bool,
    more: Sequence[str],
) -> Iterator[SetRow]:
    image, label, key_column = parts
    wanted = {key_column, SPLIT, label, *more, *([image] if with_images else [])}
    pictures = Pictures(listing, "bytes")
    for name in listing.named(".parquet"):
        key_of, number, place = row_keys(name), 0, listing.place(name)
        try:
            with listing.open(name) as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                names = parquet.schema_arrow.names
                columns = [one for one in names if one in wanted] or names[:1]
                classes = dataset_from(parquet.schema_arrow, []).columns.names
                told = _Columns(place, classes, label, image, key_column)
                for batch in parquet.iter_batches(_ROWS, columns=columns, use_threads=False):
                    table = plain_table(pa.Table.from_batches([batch]))
                    for row in _rows(table, told, more):
                        key = row.key or key_of(number)
                        split = row.split or split_in(name)
                        data = _loaded(row.image, pictures) if with_images else None
                        made = SetRow(key, data, row.label, split, place, number, row.more)
                        yield made
                        number += 1
        except UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{place} cannot be read: {str(error).partition(chr(10))[0]}"
            ) from error


@dataclass(frozen=True)
class _Columns:
    """The columns that the parts of a row are in, and the names of their class numbers."""

    place: str
    names: Names
    label: str | None = LABEL
    image: str = PICTURE
    key: str | None = KEY

    def named(self, column: str, value: Any) -> Any:
        """The value, or the name of the class whose number it is."""
        names = self.names.get(column, ())
        return _class_name(value, names) if names else value

    def split(self, value: Any) -> str | None:
        """The name of a split.

        Raises:
            InputError: it is a number without a name.
        """
        names = self.names.get(SPLIT, ())
        found = names[value] if isinstance(value, int) and value in range(len(names)) else value
        if found is None or isinstance(found, str):
            return found
        raise InputError(
            f"{self.place}: the column {SPLIT!r} has the value {value!r}, which names no split; "
            "allowed: names such as train and test, or numbers with names (ClassLabel)"
        )


def _rows(table: pa.Table, columns: _Columns, more: Sequence[str]) -> Iterator[SetRow]:
    """The rows of a table; the places of their images are not known here."""
    label = columns.label
    for row in table.to_pylist():
        key = row.get(columns.key) if columns.key else None
        yield SetRow(
            "" if key is None else safe_key(key if isinstance(key, str | bytes) else str(key)),
            row.get(columns.image),
            _class_name(row.get(label), columns.names.get(label, ())) if label else None,
            columns.split(row.get(SPLIT)),
            more={name: columns.named(name, row.get(name)) for name in more},
        )


def _placed(row: SetRow, file: str, number: int | None) -> SetRow:
    return SetRow(row.key, row.image, row.label, row.split, file, number, row.more)


def _class_name(value: Any, classes: Sequence[str]) -> str | None:
    """The name of a class: class numbers have names where the set declares them."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return classes[value]
    return str(value)


def _loaded(image: object, pictures: Pictures) -> object:
    """The struct of an image, whose bytes are read if it only has a path."""
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        try:
            return pictures.prepared().named(str(image["path"])).value
        except Refused as error:
            return {"bytes": None, "path": f"{image['path']} ({error})"}
    return image


def _schema(listing: Listing, name: str) -> pa.Schema:
    try:
        with listing.open(name) as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} is not a complete file: {error}") from error


def _of_values(
    row: Row,
    image: str,
    label: str | None,
    names: Names,
    more: Sequence[str],
    listing: Listing,
    with_images: bool,
) -> SetRow:
    columns = _Columns(listing.source, names, label)
    value = row.values.get(image)
    path = value.get("path") if isinstance(value, dict) else None
    file = row.values.get("file_name") or path or row.place.file
    known = str(file) in listing.files
    return SetRow(
        row.key,
        value if with_images else None,
        _class_name(row.values.get(label), names.get(label, ())) if label else None,
        columns.split(row.values.get(SPLIT)),
        listing.place(str(file)) if known else str(file),
        None,
        {name: columns.named(name, row.values.get(name)) for name in more},
    )
