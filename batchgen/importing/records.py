"""Rows of named values, as CSV, JSON Lines and the JSON of samples have them.

The source is read twice: once for the types of its columns and the names of its classes, then for
its rows. So a row is written as soon as it is read, and a value of another type costs its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchgen.importing.inference import Kinds, Texts, from_text
from batchgen.importing.objects import ObjectFields, ObjectSurvey
from batchgen.importing.pictures import Pictures, check_mask, checked
from batchgen.importing.rows import (
    KEY,
    Columns,
    Dataset,
    Item,
    Later,
    Place,
    Refused,
    Reject,
    Row,
    refuse,
)
from batchgen.labels.columns import IMAGE
from batchgen.plan.keys import safe_key
from batchgen.spec.call_settings import CALL_SETTINGS

PROMPTS = ("prompt", "caption", "text")
IMAGE_FILES = ("file_name", "image_path", "image_file")  # columns that name the image of a row
LABEL_MASK = "label_mask"
IMAGES = ("image", "mask", "control", LABEL_MASK)  # the image first, since others are checked by it
OBJECTS, LABEL, SPLIT = "objects", "label", "split"
# Columns with the name of a part of `input.columns`, besides settings of a call, fill that part.
# Width and height do not, since in most data they are those of the image.
_PARTS = ("negative_prompt", "class_label", "regions", "lora", "new_category", LABEL, OBJECTS)
_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
SETTINGS: dict[str, pa.DataType] = {"seed": pa.int64()} | {
    name: _TYPES[one.kind]
    for name, one in CALL_SETTINGS.items()
    if one.by_row and name not in ("width", "height")
}


@dataclass(frozen=True)
class Record:
    """One row of a source: its values by column, where it is, and a key if it has none.

    Attributes:
        loaded: bytes and name of images that the row contains, by column; as in a WebDataset.
        folder: the folder that names of images start from.
    """

    values: Mapping[str, Any]
    place: Place
    key: str
    loaded: Mapping[str, tuple[bytes, str]] = field(default_factory=dict)
    folder: str = ""


Records = Callable[[], Iterator[Record | Reject]]


@dataclass
class Survey:
    """What the first reading of the records found."""

    kinds: dict[str, Texts | Kinds] = field(default_factory=dict)
    objects: ObjectSurvey = field(default_factory=ObjectSurvey)
    loaded: set[str] = field(default_factory=set)
    rows: int = 0

    def see(self, record: Record, new: Callable[[], Texts | Kinds]) -> None:
        """Take a row into account."""
        self.rows += 1
        self.loaded |= record.loaded.keys()
        for name, value in record.values.items():
            if name == OBJECTS and new is Kinds:
                self.objects.see(value)
            kind = self.kinds.get(name)
            if kind is None:
                kind = self.kinds[name] = new()
            kind.see(value)

    @property
    def image_columns(self) -> dict[str, str]:
        """Column of images -> the column that names their files; those of the rows themselves."""
        texts = [name for name, kind in self.kinds.items() if kind.type() == pa.string()]
        found = {name: name for name in IMAGES if name in texts or name in self.loaded}
        if "image" not in self.kinds and "image" not in found:
            named = next((name for name in IMAGE_FILES if name in texts), None)
            found = {"image": named, **found} if named else found
        return found


def dataset_of(
    records: Records, new: Callable[[], Texts | Kinds], pictures: Pictures, has_labels: bool = True
) -> Dataset:
    """Read records into rows.

    Args:
        records: starts a reading; called twice.
        new: the kind of their values: cells of text, or JSON.
        pictures: where the image files are that rows name.
        has_labels: texts in a column ``label`` are names of classes.
    """
    survey = Survey()
    for one in records():
        if isinstance(one, Record):
            survey.see(one, new)
    columns, reader = _columns(survey, pictures, has_labels)
    return Dataset(
        columns, reader.items(records()), unique=KEY not in survey.kinds, total=survey.rows
    )


@dataclass(frozen=True)
class _Reader:
    """Makes rows of records."""

    survey: Survey
    pictures: Pictures
    images: Mapping[str, str]
    names: tuple[str, ...] | None
    objects: ObjectFields | None

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The numbers of the classes by name."""
        return {name: number for number, name in enumerate(self.names or ())}

    def items(self, records: Iterator[Record | Reject]) -> Iterator[Item]:
        for record in records:
            if isinstance(record, Reject):
                yield record
                continue
            try:
                key = self._key(record)
                values = self._values(record)
            except Refused as error:
                yield Reject(record.place, error.reason, str(error), record.key)
                continue
            if self.images or self.objects:
                yield Later(key, record.place, _Making(self, record, values))
            else:
                yield Row(key, values, record.place)

    def _key(self, record: Record) -> str:
        if KEY not in record.values:
            return record.key
        given = record.values[KEY]
        if given is None or given == "":
            refuse("bad-value", f"{_where(record)}: the key is empty", "a key for each row")
        return safe_key(given if isinstance(given, str) else str(given))

    def _values(self, record: Record) -> dict[str, Any]:
        """The plain values of a row, without images and objects."""
        found: dict[str, Any] = {}
        for name, value in record.values.items():
            if name == KEY or name in self.images or (name == OBJECTS and self.objects):
                continue
            where = f"{_where(record)}, field {name!r}"
            try:
                found[name] = self._value(name, value, where)
            except ValueError as error:
                raise Refused("bad-value", str(error)) from error
        return found

    def _value(self, name: str, value: Any, where: str) -> Any:
        kind = self.survey.kinds[name]
        if name == LABEL and self.names is not None:
            fits = kind.fits(value, where) if isinstance(kind, Kinds) else value
            return self.numbers.get(fits) if fits else None
        if name in SETTINGS and isinstance(value, str):
            return from_text(value, SETTINGS[name], where)
        return kind.fits(value, where)

    def finished(self, record: Record, plain: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of a row with its images and objects."""
        values, size = dict(plain), _size_in(plain)
        for column, named in self.images.items():
            given = record.values.get(named)
            if column in record.loaded:
                picture = checked(*record.loaded[column], column)
            elif given in (None, ""):
                continue
            else:
                picture = self.pictures.named(str(given), column, (record.folder, ""))
            values[column] = picture.value
            size = picture.size if column == "image" and picture.size else size
            if column == LABEL_MASK and None not in (picture.stored, size):
                check_mask(picture, size, _where(record))
        if self.objects is not None:
            where = f"{_where(record)}, objects"
            found = self.survey.objects.numbered(record.values.get(OBJECTS), where)
            values[OBJECTS] = self.objects.value(found, size, where)
        return values


@dataclass(frozen=True)
class _Making:
    """A row whose images are still to be read."""

    reader: _Reader
    record: Record
    plain: Mapping[str, Any]

    def __call__(self) -> Mapping[str, Any]:
        return self.reader.finished(self.record, self.plain)


def _columns(survey: Survey, pictures: Pictures, has_labels: bool) -> tuple[Columns, _Reader]:
    images = survey.image_columns
    objects = survey.objects.fields() if "bbox" in survey.objects.known else None
    names = _class_names(survey) if has_labels else None
    fields: dict[str, pa.DataType] = {name: IMAGE for name in images}
    for name, kind in survey.kinds.items():
        if name in (KEY, *fields) or (name in images.values() and name in IMAGES):
            continue
        fields[name] = _type(name, kind, names, objects)
    parts = {KEY: KEY} | {name: name for name in (*_PARTS, *SETTINGS) if name in fields}
    parts |= {name: name for name in IMAGES if name in images}
    prompt = next((name for name in PROMPTS if fields.get(name) == pa.string()), None)
    parts |= {"prompt": prompt} if prompt else {}
    if objects is None:
        parts.pop(OBJECTS, None)
    declared = {LABEL: names} if names else {}
    if objects is not None and objects.names:
        declared[OBJECTS] = objects.names
    categories = tuple({"name": name} for name in (objects.names if objects else None) or ())
    columns = Columns(pa.schema(list(fields.items())), declared, parts, categories)
    if images.keys() - survey.loaded:
        pictures = pictures.prepared()
    return columns, _Reader(survey, pictures, images, names, objects)


def _type(
    name: str,
    kind: Texts | Kinds,
    names: tuple[str, ...] | None,
    objects: ObjectFields | None,
) -> pa.DataType:
    if name == LABEL and names is not None:
        return pa.int64()
    if name == OBJECTS and objects is not None:
        return objects.type
    if name in SETTINGS and isinstance(kind, Texts):
        return SETTINGS[name]
    return kind.type()


def _class_names(survey: Survey) -> tuple[str, ...] | None:
    """The names of the classes, if a column ``label`` has texts."""
    kind = survey.kinds.get(LABEL)
    if kind is None or kind.type() != pa.string() or not kind.distinct:
        return None
    return tuple(sorted(kind.distinct))


def _size_in(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of the image, if the row says it."""
    sides = values.get("image_width"), values.get("image_height")
    if all(isinstance(one, int) and one > 0 for one in sides):
        return sides  # type: ignore[return-value]
    return None


def _where(record: Record) -> str:
    return f"{record.place.file} {record.place.at}".rstrip()


def with_prompts(dataset: Dataset, template: str, names: tuple[str, ...]) -> Dataset:
    """Add a column ``prompt``, from the names of the classes.

    Args:
        template: text with ``{label}`` for the name.
    """
    columns = dataset.columns
    if "prompt" in columns.parts:
        return dataset
    schema = columns.schema.append(pa.field("prompt", pa.string()))
    columns = replace(columns, schema=schema, parts={**columns.parts, "prompt": "prompt"})
    prompts = tuple(template.replace("{label}", name) for name in names)
    return replace(dataset, columns=columns, items=_prompted(dataset.items, prompts))


def _prompted(items: Iterator[Item], prompts: tuple[str, ...]) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Row):
            yield replace(item, values=_with_prompt(item.values, prompts))
        elif isinstance(item, Later):
            yield replace(item, make=_Prompted(item.make, prompts))
        else:
            yield item


@dataclass(frozen=True)
class _Prompted:
    make: Callable[[], Mapping[str, Any]]
    prompts: tuple[str, ...]

    def __call__(self) -> Mapping[str, Any]:
        return _with_prompt(self.make(), self.prompts)


def _with_prompt(values: Mapping[str, Any], prompts: tuple[str, ...]) -> dict[str, Any]:
    label = values.get(LABEL)
    return {**values, "prompt": None if label is None else prompts[label]}
