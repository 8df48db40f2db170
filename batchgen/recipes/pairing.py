"""Pairs samples with source images: of their own class, of another class, or by key."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from batchgen.errors import InputError
from batchgen.labels.columns import IMAGE
from batchgen.recipes import draws
from batchgen.recipes.reasons import Refused
from batchgen.recipes.recipe import Pair, Recipe
from batchgen.recipes.samples import Samples, row_values
from batchgen.recipes.sources import Source, values_of

SOFT = "soft_label"


class Pool:
    """The source images of a pair: their keys, labels and pixels.

    Images that are stored in the table as bytes are copied once to a temporary file, since samples
    read them in any order.

    Raises:
        InputError: there is no image column, no label column, or a key occurs twice.
    """

    def __init__(self, source: Source, column: str, label: str | None, field: str) -> None:
        self.names = source.declared.class_names(label) if label else None
        self.keys: list[str] = []
        self.labels: list[Any] = []
        self._paths: list[str | None] = []
        self._places: list[tuple[int, int]] = []
        self._file: BinaryIO | None = None
        self._end = 0
        columns = [column, label] if label else [column]
        missing = [name for name in columns if name not in source.schema.names]
        if missing:
            known = ", ".join(source.schema.names)
            raise InputError(
                f"{field}: there is no column {missing[0]!r} in {source.place}; there are: {known}"
            )
        for batch in source.batches(columns):
            images = values_of(batch.table, column, f"{field}: {source.place}")
            labels = row_values(batch, label) if label else [None] * len(images)
            for key, image, one in zip(batch.keys, images, labels, strict=True):
                if key is not None and image is not None:
                    self._add(key, image, one)
        if not self.keys:
            raise InputError(f"{field}: {source.place} has no images with keys")
        self.number = {key: number for number, key in enumerate(self.keys)}
        if len(self.number) < len(self.keys):
            raise InputError(f"{field}: a key occurs twice in {source.place}; keys must be unique")
        self.words = draws.words_of(self.keys)
        self.of_class = self._by_class()

    def image(self, number: int) -> dict[str, Any]:
        """Read an image: its bytes, or only its path."""
        start, size = self._places[number]
        data = None
        if size:
            assert self._file is not None
            self._file.seek(start)
            data = self._file.read(size)
        return {"bytes": data, "path": self._paths[number]}

    def close(self) -> None:
        """Remove the temporary file."""
        if self._file is not None:
            self._file.close()

    def _add(self, key: str, image: Any, label: Any) -> None:
        if isinstance(image, bytes):
            image = {"bytes": image, "path": None}
        elif isinstance(image, str):
            image = {"bytes": None, "path": image}
        data = image.get("bytes") or b""
        if data and self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115, see close()
        if data and self._file is not None:
            self._file.write(data)
        self.keys.append(key)
        self.labels.append(label)
        self._paths.append(image.get("path"))
        self._places.append((self._end, len(data)))
        self._end += len(data)

    def _by_class(self) -> dict[Any, np.ndarray[Any, np.dtype[np.int64]]]:
        found: dict[Any, list[int]] = {}
        for number, label in enumerate(self.labels):
            if label is not None:
                found.setdefault(label, []).append(number)
        return {label: np.array(numbers) for label, numbers in found.items()}


class Pairing:
    """Adds the image of a pair to samples, with its key and label.

    Args:
        recipe: its seed, label column and strength are used.
        pair: which image a sample gets.
        pool: the images.
        names: names of the classes of the rows, if their labels are numbers.
        field: where the recipe has it, for messages.
        same: the images are those of the rows themselves.
    """

    def __init__(
        self,
        recipe: Recipe,
        pair: Pair,
        pool: Pool,
        names: Sequence[str] | None,
        field: str,
        same: bool,
    ) -> None:
        self._recipe, self._pair, self._pool = recipe, pair, pool
        self._names, self._field, self._same = names, field, same
        self._dice = draws.Dice(recipe.seed, f"pair.{pair.into}")
        self._class_dice = draws.Dice(recipe.seed, f"pair.{pair.into}#class")
        # Labels are compared as they are if both sides number them alike, else by their names.
        self._as_they_are = names == pool.names
        self._classes = {self._pool_name(label): label for label in pool.of_class}

    def add_to(self, samples: Samples) -> None:
        """Add the columns; samples without a fitting image are rejected."""
        labels = self._labels(samples)
        by_key = self._pair.partner.column is not None
        places = self._by_key(samples) if by_key else self._drawn(samples, labels)
        pool, into = self._pool, self._pair.into
        blank = {"bytes": None, "path": None}
        images = [blank if one < 0 else pool.image(one) for one in places]
        found = [None if one < 0 else pool.labels[one] for one in places]
        samples.add(into, pa.array(images, IMAGE))
        keys = [None if one < 0 else pool.keys[one] for one in places]
        samples.add(f"{into}_key", pa.array(keys, pa.string()))
        shown = [self._shown(one) for one in found]
        samples.add(f"{into}_label", self._array(shown))
        if self._pair.label == "source":
            samples.add(self._recipe.label, self._array(shown))
        elif self._pair.label == "soft":
            samples.add(SOFT, self._soft(samples, labels, shown))

    def _by_key(self, samples: Samples) -> list[int]:
        column = str(self._pair.partner.column)
        if not samples.has(column):
            raise InputError(f"{self._field}.with.column: there is no column {column!r}")
        places = []
        for number, key in enumerate(samples.values(column)):
            place = -1 if key is None else self._pool.number.get(str(key), -1)
            if place < 0:
                message = f"{self._field}: no image has the key {key!r}"
                samples.refuse(number, Refused("no-pair", message))
            places.append(place)
        return places

    def _drawn(self, samples: Samples, labels: list[Any]) -> list[int]:
        """Draw the class of the image, then the image."""
        wanted = self._other(samples, labels) if self._pair.partner.partner == "other" else labels
        places = [-1] * len(samples)
        groups: dict[Any, list[int]] = {}
        for number, label in enumerate(wanted):
            if label is not None:
                groups.setdefault(label, []).append(number)
        words = self._dice.words(samples.draw_keys)
        for label, mine in groups.items():
            pool = self._pool.of_class.get(self._classes.get(label))
            if pool is None:
                for number in mine:
                    message = f"{self._field}: no image has the label {label!r}"
                    samples.refuse(number, Refused("unknown-class", message))
                continue
            self._draw_of(samples, mine, pool, words, places)
        return places

    def _draw_of(
        self,
        samples: Samples,
        mine: list[int],
        pool: Any,
        words: draws.Words,
        places: list[int],
    ) -> None:
        """Draw an image of one class for these samples; a row does not get its own image."""
        members = self._pool.words[pool]
        own = np.full(len(mine), -1, dtype=np.int64)
        if self._same:
            at = {number: place for place, number in enumerate(pool.tolist())}
            numbers = self._pool.number
            own[:] = [at.get(numbers.get(samples.row_keys[one], -1), -1) for one in mine]
        drawn = pool[draws.nearest_of(words[mine], members, own)].tolist()
        for number, place, itself in zip(mine, drawn, own.tolist(), strict=True):
            if itself >= 0 and len(pool) == 1:
                message = f"{self._field}: no other image has this label"
                samples.refuse(number, Refused("no-pair", message))
            else:
                places[number] = place

    def _other(self, samples: Samples, labels: list[Any]) -> list[Any]:
        """Draw another class than the sample's own, each with the same probability."""
        names = list(self._classes)
        at = {name: place for place, name in enumerate(names)}
        own = np.array([at.get(label, -1) for label in labels], dtype=np.int64)
        words = self._class_dice.words(samples.draw_keys)
        members = draws.words_of([str(one) for one in names])
        drawn = draws.nearest_of(words, members, own).tolist()
        wanted: list[Any] = []
        for number, (label, place) in enumerate(zip(labels, drawn, strict=True)):
            if label is not None and names == [label]:
                message = f"{self._field}: there is no other class than {label!r}"
                samples.refuse(number, Refused("no-pair", message))
            is_none = label is None or names == [label]
            wanted.append(None if is_none else names[place])
        return wanted

    def _labels(self, samples: Samples) -> list[Any]:
        """The label of each row, in the form in which labels are compared."""
        label = self._recipe.label
        if self._pair.partner.column and self._pair.label != "soft":
            return []
        if not samples.has(label):
            raise InputError(f"{self._field}: the rows have no column {label!r} with their class")
        labels = [self._row_name(one) for one in samples.values(label)]
        for number, one in enumerate(labels):
            if one is None:
                message = f"{self._field}: the label of the row is null"
                samples.refuse(number, Refused("null-class", message))
        return labels

    def _row_name(self, label: Any) -> Any:
        return label if self._as_they_are else _named(label, self._names)

    def _pool_name(self, label: Any) -> Any:
        return label if self._as_they_are else _named(label, self._pool.names)

    def _shown(self, label: Any) -> Any:
        """The label of an image as the rows would have it."""
        if label is None or self._as_they_are:
            return label
        name = _named(label, self._pool.names)
        if self._names is None:
            return name
        return self._names.index(name) if name in self._names else None

    def _array(self, labels: list[Any]) -> pa.Array:
        numbered = all(one is None or isinstance(one, int) for one in labels)
        if self._names is not None or (numbered and self._as_they_are and self._is_numbered):
            return pa.array(labels, pa.int64())
        return pa.array([None if one is None else str(one) for one in labels], pa.string())

    @property
    def _is_numbered(self) -> bool:
        return all(isinstance(label, int) for label in self._pool.of_class)

    def _soft(self, samples: Samples, labels: list[Any], shown: list[Any]) -> pa.Array:
        """The row's label weighs strength ** gamma (Diff-Mix), that of the image the rest."""
        strengths = samples.values("strength")
        numbered = self._names is not None or self._is_numbered
        kind = pa.int64() if numbered else pa.string()
        own = samples.values(self._recipe.label)
        made: list[list[dict[str, Any]] | None] = []
        for label, other, strength in zip(own, shown, strengths, strict=True):
            if label is None or other is None or strength is None:
                made.append(None)
                continue
            weight = float(strength) ** self._pair.gamma
            made.append(
                [
                    {"label": label if numbered else str(label), "weight": weight},
                    {"label": other if numbered else str(other), "weight": 1 - weight},
                ]
            )
        return pa.array(made, pa.list_(pa.struct([("label", kind), ("weight", pa.float64())])))


def _named(label: Any, names: Sequence[str] | None) -> Any:
    """The name of a label; a number without a name is written out."""
    if label is None:
        return None
    if names and isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return str(label)


def image_column(source: Source, declared: Mapping[str, str]) -> str:
    """The column of images of a source: the declared one, else the first that holds images.

    Raises:
        InputError: there is none.
    """
    named = declared.get("image", "image")
    if named in source.schema.names:
        return str(named)
    found: list[str] = [name for name in source.schema.names if source.is_image(name)]
    if not found:
        raise InputError(f"pair.images: {source.place} has no column of images")
    return found[0]
