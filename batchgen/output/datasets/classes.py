"""The categories of an exported dataset: the names and ids of the numbers in ``objects``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from batchgen.errors import InputError
from batchgen.labels.objects import Category as Value
from batchgen.spec.labels_section import Category


@dataclass(frozen=True)
class Classes:
    """The categories of a dataset, in their order; the place of one in it starts at 0.

    Attributes:
        categories: their names and what else is known of them.
        values: the value of each in the column ``objects``, if the spec does not declare them.
    """

    categories: tuple[Category, ...]
    values: tuple[Value, ...] | None = None

    @cached_property
    def _places(self) -> dict[Value, int]:
        if self.values is not None:
            return {value: place for place, value in enumerate(self.values)}
        names: dict[Value, int] = {one.name: place for place, one in enumerate(self.categories)}
        return names | {place: place for place in range(len(self.categories))}

    def place(self, value: Value) -> int:
        """The place of the category with this number or name."""
        return self._places[value]

    def name(self, value: Value) -> str:
        """The name of the category with this number or name."""
        return self.categories[self.place(value)].name

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The id of each category in a COCO file: its own, else its place.

        Raises:
            InputError: two categories have the same id.
        """
        ids = [place if one.id is None else one.id for place, one in enumerate(self.categories)]
        twice = next((one for one in ids if ids.count(one) > 1), None)
        if twice is not None:
            names = [one.name for one, number in zip(self.categories, ids, strict=True)]
            both = [name for name, number in zip(names, ids, strict=True) if number == twice]
            raise InputError(
                f"labels.categories: {both[0]!r} and {both[1]!r} have the id {twice} (a category "
                "without an id has its place in the list, from 0 on); give each its own"
            )
        return tuple(ids)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names by number; None if the numbers are not places."""
        return None if self.values is not None else tuple(one.name for one in self.categories)

    def to_json(self) -> dict[str, Any]:
        return {
            "categories": [one.model_dump(mode="json") for one in self.categories],
            "values": None if self.values is None else list(self.values),
        }


def classes_from(tree: Mapping[str, Any]) -> Classes:
    """The inverse of ``Classes.to_json``."""
    values = tree["values"]
    return Classes(
        tuple(Category.model_validate(one) for one in tree["categories"]),
        None if values is None else tuple(values),
    )


def classes_found(values: Iterable[Value]) -> Classes:
    """The categories of an output that does not declare any: those that occur, sorted.

    A number is its own id, and its text is its name.
    """
    found = tuple(sorted(set(values), key=lambda one: (isinstance(one, str), one)))
    categories = [
        Category(name=str(one), id=one if isinstance(one, int) else None) for one in found
    ]
    return Classes(tuple(categories), found)
