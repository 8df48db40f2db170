"""What a reader of a source gives: columns, then rows, tables and refused rows, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import pyarrow as pa

from batchgen.errors import BatchgenError, RejectRow
from batchgen.importing.reasons import is_reason
from batchgen.labels.columns import IMAGE, objects_feature

if TYPE_CHECKING:
    from batchgen.importing.listing import Listing

KEY = "key"
ImageMode = Literal["bytes", "reference"]


class Refused(BatchgenError):
    """A row that cannot be imported; the other rows continue.

    Args:
        reason: one of ``reasons.REASONS``.
        message: what was found, and what is allowed.
    """

    def __init__(self, reason: str, message: str) -> None:
        if not is_reason(reason):
            raise AssertionError(f"{reason} is not in the list of reasons")
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where a row is: its file's name, and a line, an id or a member in it."""

    file: str
    at: str = ""


@dataclass(frozen=True)
class Row:
    """One row: its key, and the values of the other columns; a missing one is null."""

    key: str
    values: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Reject:
    """A row, or a part of a source, that is not imported."""

    place: Place
    reason: str
    message: str
    key: str = ""


@dataclass(frozen=True)
class Later:
    """A row that has to read files first; it may be made in any thread.

    Attributes:
        make: makes the row; raises Refused or RejectRow.
    """

    key: str
    place: Place
    make: Callable[[], Mapping[str, Any]]

    def row(self) -> Row | Reject:
        """The row, or why it is refused."""
        try:
            return Row(self.key, self.make(), self.place)
        except (Refused, RejectRow) as error:
            return Reject(self.place, error.reason, str(error), self.key)


Item: TypeAlias = "Row | Later | Reject | pa.Table"


@dataclass(frozen=True)
class Columns:
    """The columns of a source, which are known before its rows.

    Attributes:
        schema: all columns but the key.
        names: column -> the names of its class numbers.
        parts: part of ``input.columns`` -> column, so that a run needs no flags.
        categories: those of ``objects``, in the order of their numbers, as metadata.
        more: further metadata of the source.
    """

    schema: pa.Schema
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    categories: tuple[Mapping[str, Any], ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)

    def all_features(self) -> dict[str, Any]:
        """The Hugging Face feature of each column, in the form of `datasets` 4."""
        found: dict[str, Any] = {}
        for one in (pa.field(KEY, pa.string()), *self.schema):
            names = self.names.get(one.name)
            if one.name in self.features:
                found[one.name] = self.features[one.name]
            elif one.type == IMAGE:
                found[one.name] = {"_type": "Image"}
            elif is_objects(one.type):
                found[one.name] = objects_feature(one.type, names)
            elif names is not None:
                found[one.name] = {"names": list(names), "_type": "ClassLabel"}
            else:
                kind = pa.struct([(one.name, one.type)])
                found[one.name] = objects_feature(kind, None)[one.name]
        return found


def is_objects(kind: pa.DataType) -> bool:
    """Whether a column holds objects: a struct of lists with boxes and categories."""
    return pa.types.is_struct(kind) and {"bbox", "category"} <= {one.name for one in kind}


@dataclass
class Dataset:
    """A source that is read: its columns, and its rows one after another.

    Attributes:
        unique: the keys are unique by themselves, so nobody has to compare them.
        total: the number of rows, if it is known before.
        notes: what a user should know; complete once all items are read.
    """

    columns: Columns
    items: Iterator[Item]
    unique: bool = False
    total: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How a source is read.

    Attributes:
        images: whether image files are copied into the rows, or only named by path or URL.
        image_root: the folder that relative image names start from; None: the source's own.
        prompt: a template with ``{label}``, for sources with a class of each image.
    """

    images: ImageMode = "bytes"
    image_root: Listing | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        name: as after ``--kind``.
        about: what such a source is, in one phrase.
        fits: whether a source looks like one of this kind.
        read: reads the source; raises InputError if it is not of this kind.
    """

    name: str
    about: str
    fits: Callable[[Listing], bool]
    read: Callable[[Listing, Options], Dataset]


def refuse(reason: str, found: str, allowed: str) -> NoReturn:
    """Raise Refused with a message of two halves."""
    raise Refused(reason, f"{found}; allowed: {allowed}")
