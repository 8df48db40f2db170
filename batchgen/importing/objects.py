"""The column ``objects`` of a source: its type, and the checked objects of each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchgen.errors import RejectRow, shown
from batchgen.importing.inference import Kinds
from batchgen.importing.rows import Refused, refuse
from batchgen.labels.objects import read_objects
from batchgen.labels.rle import read_rle

Size = tuple[int, int]

LONGEST_NAME = 200  # of a category, as in labels.categories
_ANY_SIZE = (1 << 31, 1 << 31)
_NUMBERS = pa.list_(pa.float64())
_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
# Field of an object -> its type, in the order of the struct.
FIELDS: dict[str, pa.DataType] = {
    "id": pa.int64(),
    "bbox": _NUMBERS,
    "category": pa.int64(),
    "area": pa.float64(),
    "iscrowd": pa.int8(),
    "segmentation": pa.list_(_NUMBERS),
    "rle": _RLE,
    "keypoints": _NUMBERS,
    "num_keypoints": pa.int32(),
}


@dataclass(frozen=True)
class ObjectFields:
    """The fields that the objects of a source have.

    Attributes:
        kinds: field -> the type of one value.
        names: the names of the categories, by number; None if the source does not say.
    """

    kinds: Mapping[str, pa.DataType]
    names: tuple[str, ...] | None

    @property
    def type(self) -> pa.StructType:
        """A struct of one list for each field."""
        return pa.struct([(name, pa.list_(kind)) for name, kind in self.kinds.items()])

    def value(
        self, objects: Sequence[Mapping[str, Any]], size: Size | None, where: str
    ) -> dict[str, Any]:
        """The objects of one image as a struct of lists.

        Args:
            size: that of the image; None if it is not known.

        Raises:
            Refused: a wrong box, polygon, mask, keypoint or category, or an id twice.
        """
        value = {name: [one.get(name) for one in objects] for name in self.kinds}
        if "rle" in value:
            value["rle"] = [
                _rle(one, size, f"{where}, object {number}")
                for number, one in enumerate(value["rle"])
            ]
        try:
            checked = {name: one for name, one in value.items() if size or name != "rle"}
            read_objects(checked, size or _ANY_SIZE, "coco", self.names, "objects")
        except RejectRow as error:
            message = str(error).replace("column 'objects'", where, 1)
            raise Refused("bad-objects", message) from error
        return value


def _rle(value: Any, size: Size | None, where: str) -> dict[str, Any] | None:
    """A mask with compressed runs; that of an image of unknown size has to be so already.

    Raises:
        Refused: it is no mask, or not of this size.
    """
    if value is None:
        return None
    try:
        told = list(value["size"])
        width, height = size or (told[1], told[0])
        rle = read_rle(value, (width, height))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        wanted = "" if size is None else f", here [{size[1]}, {size[0]}]"
        allowed = f"`counts`, and `size`: height and width of the image{wanted}"
        refuse("bad-objects", f"{where}: rle: {error}", allowed)
    return {"size": list(rle.size), "counts": rle.counts}


def fields_of(
    known: Iterable[str],
    names: Sequence[str] | None,
    others: Mapping[str, Kinds] | None = None,
) -> ObjectFields:
    """The fields of a source's objects: those of COCO that it has, and further plain ones."""
    present = {"bbox", "category", *known}
    kinds = {name: kind for name, kind in FIELDS.items() if name in present}
    for name, one in sorted((others or {}).items()):
        kinds.setdefault(name, one.type())
    return ObjectFields(kinds, None if names is None else tuple(names))


@dataclass
class ObjectSurvey:
    """What the objects of rows have: their fields, and the names of their categories.

    Attributes:
        names: the texts that are categories, if these are texts.
    """

    known: set[str] = field(default_factory=set)
    others: dict[str, Kinds] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def see(self, value: Any) -> None:
        """Take a row's objects into account; a value of another form is refused later."""
        try:
            found = each_object(value)
        except ValueError:
            return
        for one in found:
            for field_name, given in one.items():
                if field_name in FIELDS:
                    self.known.add(field_name)
                else:
                    self.others.setdefault(field_name, Kinds()).see(given)
            name = one.get("category")
            if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME:
                self.names.add(name)

    def fields(self) -> ObjectFields:
        """The fields, with the names in the order of the alphabet."""
        return fields_of(self.known, sorted(self.names) or None, self.others)

    def numbered(self, value: Any, where: str) -> list[dict[str, Any]]:
        """A row's objects, with numbers for the names of their categories.

        Raises:
            Refused: they have another form than those of the other rows.
        """
        try:
            found = each_object(value)
            for one in found:
                for name in one.keys() & self.others.keys():
                    one[name] = self.others[name].fits(one[name], name)
        except ValueError as error:
            raise Refused("bad-objects", f"{where}: {error}") from error
        for number, one in enumerate(found):
            category = one.get("category")
            if self.numbers and not (isinstance(category, str) and category in self.numbers):
                given = f"{where}, object {number}: category {shown(category)}"
                allowed = f"the name of a category, of 1 to {LONGEST_NAME} characters"
                refuse("unknown-category", given, allowed)
            if self.numbers:
                one["category"] = self.numbers[str(category)]
        return found

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each category by its name; complete after all rows were seen."""
        return {name: number for number, name in enumerate(sorted(self.names))}


def each_object(value: Any) -> list[dict[str, Any]]:
    """The objects of a row of JSON: a struct of lists as Hugging Face has it, or a list of structs.

    Raises:
        ValueError: another form.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        lists = {name: one for name, one in value.items() if isinstance(one, list)}
        if len(lists) < len(value) or len({len(one) for one in lists.values()}) > 1:
            raise ValueError("objects need lists of equal lengths, one for each field")
        count = len(next(iter(lists.values()), []))
        value = [{name: one[at] for name, one in lists.items()} for at in range(count)]
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise ValueError("objects need a struct of lists, or a list of structs")
    return [_with_names(one) for one in value]


def _with_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the names of fields as here; Hugging Face's guide has ``categories``."""
    one = dict(given)
    for name in ("categories", "category_id"):
        if name in one and "category" not in one:
            one["category"] = one.pop(name)
    if isinstance(one.get("segmentation"), Mapping):
        one["rle"] = one.pop("segmentation")
    return one
