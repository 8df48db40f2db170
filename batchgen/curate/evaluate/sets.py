"""Reads sets of labelled images: outputs, Parquet, and any source that an import takes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from batchgen.curate.prints import Prints
from batchgen.curate.selection import NAME, selected_keys
from batchgen.errors import InputError, RejectRow
from batchgen.images.likeness import coarse, planes
from batchgen.images.perceptual_hash import crop_hashes
from batchgen.images.resize import resized_to
from batchgen.images.source import open_image
from batchgen.importing.records import SPLIT
from batchgen.importing.splits import split_in
from batchgen.importing.target import PARQUET, target_at
from batchgen.importing.work import import_source, source_at
from batchgen.output.find import contents
from batchgen.output.finished import refuse_unfinished
from batchgen.output.formats import format_of, label_names
from batchgen.output.ledger import Ledger
from batchgen.output.restrict import Chosen
from batchgen.plan.plan import Plan
from batchgen.recipes.sources import Source, parquet_source
from batchgen.spec.splits import TRAIN, split_named
from batchgen.storage import find_files, open_store

Array = np.ndarray[Any, Any]
SOURCE_KEYS = re.compile(r"(image|source|init|reference)_key")
CLIP = "clip_similarity"
ROW_KEY = "row_key"  # a recipe's rows; of their images, if the task reads images


@dataclass(frozen=True)
class Row:
    """One image of a set, as it is read.

    Attributes:
        key: its name.
        label: its class; None if there is none.
        split: its split, if the set has that column.
        image: the file's bytes, or the struct of Hugging Face datasets.
        source_key: key of the real image that it was made from, if the set has it.
        clip: its similarity to its prompt, if the set has that score.
    """

    key: str
    label: str | None
    image: Any
    split: str = ""
    source_key: str | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Origin:
    """Where the rows of a set come from; they can be read again, in the same order.

    ``notes`` say what could not be read.
    """

    place: str
    rows: Callable[[], Iterator[Row]]
    ledger: Ledger | None = None
    parts: tuple[Plan, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """All that is kept in memory of a set: of each image its facts, and a small copy.

    Attributes:
        name: ``real``, ``synthetic``, ``held-out`` or ``validation``, for messages.
        origin: where its images can be read again.
        keys, labels: of each image.
        digests: 16 bytes of the SHA-256 of its size and pixels.
        crops: perceptual hashes of each image and of its crops (n, 11) uint64.
        planes: each image in 1,536 bytes, to find near copies (n, 1536) uint8.
        small: copies (n, side, side, 3) uint8, which the classifiers read.
        numbers: of the images among the rows of the origin, ascending.
        splits: as the set has them; empty texts without.
        source_keys: keys of the real images that they were made from.
        clip: similarities to the prompts (n,), NaN where there is none.
    """

    name: str
    origin: Origin
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    digests: tuple[bytes, ...]
    crops: Array
    planes: Array
    small: Array
    numbers: Array
    splits: tuple[str, ...] = ()
    source_keys: frozenset[str] = field(default_factory=frozenset)
    clip: Array = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def place(self) -> str:
        return self.origin.place

    @property
    def hashes(self) -> Array:
        """Perceptual hashes (n,) uint64."""
        hashes: Array = self.crops[:, 0]
        return hashes

    @property
    def prints(self) -> Prints:
        """What finds near copies of its images."""
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(len(self), -1)
        return Prints(self.keys, digests, self.crops, self.planes, coarse(self.planes))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its keys, labels and pixels."""
        facts = hashlib.sha256()
        for key, label, digest in zip(self.keys, self.labels, self.digests, strict=True):
            facts.update(f"{key}\0{label}\0".encode() + digest)
        return facts.hexdigest()

    def counts(self) -> dict[str, int]:
        """Class -> number of images."""
        names, counts = np.unique(np.array(self.labels), return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def only(self, chosen: Array, name: str) -> ImageSet:
        """The images at these places (n,), ascending."""
        places = [int(one) for one in chosen]
        return replace(
            self,
            name=name,
            keys=tuple(self.keys[one] for one in places),
            labels=tuple(self.labels[one] for one in places),
            digests=tuple(self.digests[one] for one in places),
            splits=tuple(self.splits[one] for one in places),
            crops=self.crops[places],
            planes=self.planes[places],
            small=self.small[places],
            numbers=self.numbers[places],
            clip=self.clip[places],
        )

    def of_split(self, split: str, name: str) -> ImageSet | None:
        """The images of ``train``, ``test`` or ``validation``; None if there are none.

        Splits with other names count as ``train``.
        """
        found = np.array([(split_named(one) or TRAIN) == split for one in self.splits])
        return self.only(np.flatnonzero(found), name) if found.any() else None

    def pixels(self) -> Iterator[Array]:
        """The images at their own size, uint8 RGB (height, width, 3), in order."""
        wanted = set(self.numbers.tolist())
        for number, row in enumerate(self.origin.rows()):
            if number in wanted:
                yield _pixels(row, self.place)


def load_set(name: str, origin: Origin, side: int) -> ImageSet:
    """Read a set once.

    Raises:
        InputError: it has no image or no labels, a key occurs twice, or an image cannot be opened.
    """
    keys, labels, digests, small = [], [], [], []
    crops, smaller = [], []
    splits, sources, clip = [], set[str](), []
    for row in origin.rows():
        if row.label is None:
            raise InputError(
                f"{name} set {origin.place}: image {row.key} has no label; needed: a column label, "
                "with a value in each row"
            )
        pixels = _pixels(row, origin.place)
        keys.append(row.key)
        labels.append(row.label)
        splits.append(row.split)
        digests.append(pixel_digest(pixels))
        crops.append(crop_hashes(pixels))
        smaller.append(planes(pixels))
        small.append(resized_to(pixels, side))
        clip.append(np.nan if row.clip is None else row.clip)
        sources |= {row.source_key} if row.source_key else set()
    if not keys:
        raise InputError(f"{name} set {origin.place}: it has no images")
    if len(set(keys)) < len(keys):
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise InputError(f"{name} set {origin.place}: the key {twice} occurs twice")
    return ImageSet(
        name,
        origin,
        tuple(keys),
        tuple(labels),
        tuple(digests),
        np.stack(crops),
        np.stack(smaller),
        np.stack(small),
        np.arange(len(keys)),
        tuple(splits),
        frozenset(sources),
        np.array(clip),
    )


def pixel_digest(pixels: Array) -> bytes:
    """16 bytes of the SHA-256 of an image's size and pixels: equal only for equal images."""
    facts = hashlib.sha256(repr(pixels.shape).encode())
    facts.update(np.ascontiguousarray(pixels).tobytes())
    return facts.digest()[:16]


def _pixels(row: Row, place: str) -> Array:
    try:
        return np.asarray(open_image(row.image))
    except RejectRow as error:
        raise InputError(f"{place}: image {row.key}: {error}") from None


def find_set(given: str, held: ExitStack) -> Origin:
    """Find a set by its place.

    Args:
        given: the folder of an output, with ``:NAME`` for a selection of it; Parquet; or a source
            that an import takes, which is imported into a temporary folder.
        held: removes the temporary folder.

    Raises:
        InputError: there is none, its images or labels are missing, or it is not finished.
    """
    place, name = _parted(given)
    if not (place.lower().endswith(PARQUET) or os.path.isfile(place)):
        ledger = Ledger(open_store(place))
        if ledger.plan() is not None:
            return _output(given, ledger, name)
    if name is not None:
        raise InputError(f"{given}: {place} is not an output of batchgen, so it has no selection")
    if not _is_parquet(place):
        folder = held.enter_context(TemporaryDirectory(prefix="batchgen-eval-"))
        target = target_at(f"{folder}/rows")
        summary = import_source(source_at(place, None, "bytes"), target)
        found = _parquet(given, parquet_source(target.url))
        if not summary.rejected:
            return found
        told = "; ".join(summary.examples.values())
        many = f"{summary.rejected:,} of {summary.rows + summary.rejected:,} images"
        return replace(found, notes=(f"{given}: {many} cannot be read and are left out ({told})",))
    return _parquet(given, parquet_source(place))


def _parted(given: str) -> tuple[str, str | None]:
    """The place and the name of a selection."""
    place, colon, name = given.rpartition(":")
    if not colon or "/" in name or not NAME.fullmatch(name):
        return given, None
    return place, name


def _is_parquet(place: str) -> bool:
    if place.lower().endswith(PARQUET):
        return True
    try:
        return any(one.path.lower().endswith(PARQUET) for one in find_files(place)[1])
    except InputError:
        return False


def _output(given: str, ledger: Ledger, name: str | None) -> Origin:
    parts = ledger.parts()
    refuse_unfinished(ledger, parts, then="repeat `eval`")
    chosen = name and Chosen(name, selected_keys(ledger, parts, name))
    if isinstance(chosen, Chosen) and not chosen.keys:
        raise InputError(f"{given}: the selection {name!r} keeps no sample")

    def rows() -> Iterator[Row]:
        for plan in parts:
            form = format_of(plan)
            for marker in ledger.markers(ledger.states(plan).committed):
                files = dict(contents(ledger, marker))
                schema = form.schema(files)
                sources = _source_columns(schema.names)
                if ROW_KEY in schema.names and plan.spec.image_parts:
                    sources.append(ROW_KEY)
                table = form.read(files, {"key", "image", "label", SPLIT, CLIP, *sources})
                if isinstance(chosen, Chosen):
                    table = chosen.split(table)[0]
                yield from _rows(table.to_pylist(), label_names(schema), sources)

    return Origin(given, rows, ledger, parts)


def _source_columns(names: Sequence[str]) -> list[str]:
    return [name for name in names if SOURCE_KEYS.fullmatch(name)]


def _rows(
    rows: Sequence[dict[str, Any]], names: Sequence[str], sources: Sequence[str]
) -> Iterator[Row]:
    for row in rows:
        source = next((row[name] for name in sources if row[name]), None)
        clip, split = row.get(CLIP), str(row.get(SPLIT) or "")
        yield Row(row["key"], label_text(row["label"], names), row["image"], split, source, clip)


def label_text(value: Any, names: Sequence[str]) -> str | None:
    """A label as text: the name of its class, if the set names its numbers.

    Hugging Face datasets write -1 for an image without a label.
    """
    if value is None or (names and isinstance(value, int) and value < 0):
        return None
    is_number = isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    if names and is_number and int(value) < len(names):
        return names[int(value)]
    return str(value)


def _parquet(given: str, source: Source) -> Origin:
    parts = source.declared.parts
    image, label = parts.get("image", "image"), parts.get("label", "label")
    for column, what in ((image, "images"), (label, "labels")):
        if column not in source.schema.names:
            known = ", ".join(source.schema.names)
            raise InputError(f"{given}: no column {column!r} with {what}; its columns: {known}")
    split = SPLIT if SPLIT in source.schema.names else None
    by_file = len(source.files) > 1  # one file that is named was chosen
    names = source.declared.class_names(label) or ()
    split_names = source.declared.class_names(SPLIT) or ()

    def rows() -> Iterator[Row]:
        columns = [image, label, *([split] if split else [])]
        for batch in source.batches(columns):
            table = batch.table
            images, labels = table.column(image).to_pylist(), table.column(label).to_pylist()
            parted = table.column(split).to_pylist() if split else [None] * len(images)
            for place, key, one, text, part in zip(
                batch.names, batch.keys, images, labels, parted, strict=True
            ):
                which = label_text(part, split_names)
                if which is None and by_file:
                    which = split_in(place.rpartition("#")[0])
                yield Row(key or place, label_text(text, names), one, which or "")

    return Origin(given, rows)
