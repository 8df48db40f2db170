"""Reads the images of a shard with their labels, for an exported dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, RejectRow
from batchgen.images.geometry import Size
from batchgen.labels.columns import OBJECTS
from batchgen.labels.objects import LabelObject, read_objects
from batchgen.labels.truth import VOID
from batchgen.output.datasets.classes import Classes
from batchgen.output.formats import kept_columns
from batchgen.output.formats.image_folder import label_folder
from batchgen.output.formats.json_rows import file_name
from batchgen.output.formats.json_values import to_json
from batchgen.output.planned import names_of
from batchgen.plan.plan import Plan

MASK = "label_mask"
SPLIT = "split"
TRAIN = "train"  # the split of images without one
VOID_LABELS, NO_LABELS = "labels are void", "no labels"
_FACTS = ("key", "seed", "variant", "source_id", "prompt", "label", "labels_are")
_NEEDED = (*_FACTS, "image", "width", "height", SPLIT, OBJECTS, MASK)


@dataclass(frozen=True)
class LabelledImage:
    """One accepted sample and its labels, in pixels of the image.

    Attributes:
        number: of the sample in the output's parts, from 0 on.
        split: a name that is safe as a folder.
        file: the name of its file: the key and the extension.
        data: the file's bytes.
        size: (width, height).
        objects: empty if there are none, or if they are void and the export says ``empty``.
        mask: PNG file of class numbers; None if it has none, or as above.
        facts: further columns; ``source`` has those of the input that the output has kept.
    """

    number: int
    split: str
    file: str
    data: bytes
    size: Size
    objects: tuple[LabelObject, ...]
    mask: bytes | None
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.file.partition(".")[0]


def images_of(
    table: pa.Table, plan: Plan, shard: int, classes: Classes, column: str, void: str
) -> Iterator[LabelledImage | str]:
    """The images of a shard in the plan's order; the reason instead of an image that is left out.

    Args:
        table: the shard's accepted samples.
        plan, shard: those of the table.
        classes: the categories.
        column: the labels that the dataset needs, ``objects`` or ``label_mask``.
        void: what to do with an image whose labels are void: ``skip``, ``empty`` or ``refuse``.

    Raises:
        InputError: labels are not those that a run writes, or void with ``refuse``.
    """
    numbers = _numbers(plan, shard)
    splits = _split_names(table.schema)
    kept = _kept(table, plan)
    names = (*_NEEDED, *kept)
    rows = zip(*(_values(table, name) for name in names), strict=True)
    for place, values in enumerate(rows):
        row = dict(zip(names, values, strict=True))
        is_void = row["labels_are"] == VOID
        if is_void or row[column] is None:
            if void == "skip":
                yield VOID_LABELS if is_void else NO_LABELS
                continue
            if void == "refuse":
                what = "void (labels_are)" if is_void else f"missing ({column} is null)"
                raise InputError(
                    f"the labels of image {row['key']} are {what}; `--void skip` leaves such "
                    "images out, `--void empty` exports them as images without objects"
                )
            row[column] = None
        image = table.column("image")[place].as_py()  # one at a time: they are large
        mask = table.column(MASK)[place].as_py() if row[MASK] else None
        size = (row["width"], row["height"])
        told = {name: row[name] for name in kept if row[name] is not None}
        facts = {**{name: row[name] for name in _FACTS}, **({"source": told} if told else {})}
        yield LabelledImage(
            number=numbers[row["source_id"], row["variant"]],
            split=split_folder(row[SPLIT], splits),
            file=file_name(row["key"], image["path"]),
            data=image["bytes"],
            size=size,
            objects=_objects(row, size, classes),
            mask=mask["bytes"] if mask else None,
            facts=facts,
        )


def _kept(table: pa.Table, plan: Plan) -> list[str]:
    """The columns of the input that the output has kept and that are plain values, or lists."""
    names = [name for name, _ in plan.columns]
    kept = kept_columns(plan.spec, names, plan.model.settings).values()
    return [
        field.name
        for field in table.schema
        if field.name in kept and field.name not in _NEEDED and _is_plain(field.type)
    ]


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string)
    return any(test(kind) for test in (*tests, types.is_large_string))


def _numbers(plan: Plan, shard: int) -> dict[tuple[str, int], int]:
    """Source row and variant -> the number of the sample in the plan."""
    names = names_of(plan, shard)
    first = plan.place.first_sample + plan.sample_range(shard)[0]
    pairs = zip(names.sources.to_pylist(), names.variants.to_pylist(), strict=True)
    return {pair: first + place for place, pair in enumerate(pairs)}


def _values(table: pa.Table, name: str) -> list[Any]:
    """The values of a column as JSON; of images and masks only whether they are there."""
    if name not in table.column_names:
        return [None] * table.num_rows
    column = table.column(name)
    if name in ("image", MASK):
        return [True if valid else None for valid in column.is_valid().to_pylist()]
    return [value for chunk in column.chunks for value in to_json(chunk)]


def _objects(row: Mapping[str, Any], size: Size, classes: Classes) -> tuple[LabelObject, ...]:
    try:
        return read_objects(row[OBJECTS], size, "coco", classes.names, OBJECTS)
    except RejectRow as error:
        raise InputError(f"image {row['key']}: {error}") from error


def _split_names(schema: pa.Schema) -> list[str]:
    """The names of the splits' numbers, if the column is a ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[SPLIT]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def split_folder(split: Any, names: list[str]) -> str:
    """The folder of a split, a name that cannot lead elsewhere; ``train`` without a split."""
    if isinstance(split, int) and 0 <= split < len(names):
        split = names[split]
    return TRAIN if split is None or split == "" else label_folder(split)
