"""Reads a training set that `batchgen mix` wrote: a map-style dataset, as PyTorch wants it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, SpecError
from batchgen.images.source import open_image
from batchgen.storage import open_input, open_store

_GROUPS = 4  # row groups of images that are kept in memory
_MANIFEST = "manifest.parquet"


class MixedImages:
    """The images of a mix, by number. It pickles, so workers of a DataLoader can have it.

    Without replacement it has all rows, real and synthetic. With ``replace_probability`` it has
    the real rows, and a real image is replaced by a synthetic one with that probability: by one
    that was made from it, if there is one, else by one of its class. The same
    seed, epoch and number give the same image.

    Attributes:
        classes: names of the classes, by their numbers.

    Args:
        place: the folder of the mix, or its manifest.
        transform: called with the image (PIL, RGB).
        replace_probability: None: that of the mix.
        seed: of the replacements.
    """

    def __init__(
        self,
        place: str,
        transform: Callable[[Any], Any] | None = None,
        replace_probability: float | None = None,
        seed: int = 0,
    ) -> None:
        table = _manifest(place)
        told = json.loads(table.schema.metadata[b"batchgen"])
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        self.classes: tuple[str, ...] = tuple(features["label"]["names"])
        self.transform = transform
        chance = told["replace_probability"] if replace_probability is None else replace_probability
        if not 0 <= chance <= 1:
            raise SpecError("replace_probability", chance, "0 to 1")
        self.replace_probability: float = chance
        self.seed, self.epoch = seed, 0
        self._table, self._images = table, dict(told["columns"]["images"])
        self._synthetic = np.asarray(table.column("is_synthetic"))
        self._numbers = np.arange(table.num_rows)
        self._candidates: dict[int, list[int]] = {}
        if chance:
            self._numbers = np.flatnonzero(~self._synthetic)
            self._candidates = _candidates(table, told["replace_by"])
        self._groups: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()

    def set_epoch(self, epoch: int) -> None:
        """Draw other replacements, before each epoch; DataLoader workers must start anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """An image with its label, and the other columns of its row."""
        row = self.row_of(number)
        values = self._table.slice(row, 1).to_pylist()[0]
        image = open_image(self._bytes(values))
        found = {
            "image": image if self.transform is None else self.transform(image),
            "label": values["label"],
            "key": values["key"],
            "is_synthetic": values["is_synthetic"],
            "weight": values["weight"],
        }
        if "soft_label" in values:
            found["soft_label"] = np.asarray(values["soft_label"], np.float32)
        return found

    def row_of(self, number: int) -> int:
        """The row of the manifest whose image this number has in this epoch."""
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        row = int(self._numbers[number])
        others = self._candidates.get(row)
        if not others:
            return row
        dice = np.random.default_rng([self.seed, self.epoch, row])
        if dice.random() >= self.replace_probability:
            return row
        return others[int(dice.integers(len(others)))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}

    def _bytes(self, values: dict[str, Any]) -> bytes:
        if values["row"] is None:
            with open_input(values["file"], values["file"]) as file:
                return file.read()
        return self._in_parquet(values["file"], values["row"], self._images[values["set"]])

    def _in_parquet(self, place: str, row: int, column: str) -> bytes:
        """The image of a row; a few row groups are kept, as neighbours are often asked next."""
        with open_input(place, place) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            group = 0
            while row >= parquet.metadata.row_group(group).num_rows:
                row -= parquet.metadata.row_group(group).num_rows
                group += 1
            if (place, group) not in self._groups:
                table = parquet.read_row_group(group, columns=[column], use_threads=False)
                images = table.column(column).to_pylist()
                self._groups[place, group] = [
                    one["bytes"] if isinstance(one, dict) else one for one in images
                ]
                if len(self._groups) > _GROUPS:
                    self._groups.popitem(last=False)
        self._groups.move_to_end((place, group))
        return self._groups[place, group][row]


def _manifest(place: str) -> pa.Table:
    folder = place.removesuffix(_MANIFEST).rstrip("/") or "."
    try:
        data = open_store(folder).read(_MANIFEST)
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise InputError(
            f"{place}: it has no {_MANIFEST} that can be read; `batchgen mix` writes it"
        ) from error
    if b"batchgen" not in (table.schema.metadata or {}):
        raise InputError(f"{folder}/{_MANIFEST} was not written by `batchgen mix`")
    return table


def _candidates(table: pa.Table, by: str) -> dict[int, list[int]]:
    """Real row -> the synthetic rows that may replace it.

    Args:
        by: ``source``: those made from it; ``label``: those of its class; ``source-or-label``:
            those made from it, if there are such, else those of its class.
    """
    found: dict[int, list[int]] = {}
    for name, column in (("label", "label"), ("source", "source_key")):
        if name in by.split("-or-"):
            found |= _matching(table, "key" if name == "source" else "label", column)
    return found


def _matching(table: pa.Table, real: str, column: str) -> dict[int, list[int]]:
    """Real row -> the synthetic rows whose column has its value."""
    values, reals = table.column(column).to_pylist(), table.column(real).to_pylist()
    made = table.column("is_synthetic").to_pylist()
    groups: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        if made[row] and value is not None:
            groups.setdefault(value, []).append(row)
    return {
        row: groups[value] for row, value in enumerate(reals) if not made[row] and value in groups
    }
