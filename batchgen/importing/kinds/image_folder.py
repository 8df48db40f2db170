"""Folders of images, as Hugging Face's ImageFolder: classes, splits and metadata by folder.

``train/cat/1.png`` gives split and label; ``metadata.jsonl`` or ``metadata.csv`` in a folder gives
further columns for its images, by ``file_name``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from batchgen.errors import InputError
from batchgen.importing.inference import Kinds, Texts
from batchgen.importing.kinds import csv_rows, json_lines
from batchgen.importing.listing import Listing, file_keys, is_image_name
from batchgen.importing.pictures import Pictures
from batchgen.importing.records import LABEL, SPLIT, Record, dataset_of, with_prompts
from batchgen.importing.rows import Dataset, Kind, Options, Place, Reject
from batchgen.importing.splits import by_first_folder
from batchgen.spec.splits import split_named

FILE_NAME = "file_name"
_TAKEN = {"image": "metadata_image"}  # the column of the images themselves
_NAMED = 3
_METADATA = ("metadata.jsonl", "metadata.csv")


def fits(listing: Listing) -> bool:
    return any(is_image_name(name) for name in listing.files)


def read(listing: Listing, options: Options) -> Dataset:
    """Read all images of the folder, in the order of their names."""
    images = [name for name in listing.files if is_image_name(name)]
    if not images:
        raise InputError(f"source {listing.source}: no images; a folder of images needs some")
    metadata = [name for name in listing.files if name.rpartition("/")[2] in _METADATA]
    if len({name.rpartition(".")[2] for name in metadata}) > 1:
        raise InputError(
            f"source {listing.source}: it has {metadata[0]} and others of another form; use only "
            "metadata.jsonl, or only metadata.csv"
        )
    new = Texts if metadata and metadata[0].endswith(".csv") else Kinds
    pictures = Pictures(listing, options.images, options.image_root)
    records = partial(_records, listing, images, metadata)
    dataset = dataset_of(records, new, pictures)
    dataset = replace(dataset, unique=dataset.unique, total=len(images))
    others = listing.files.keys() - set(images) - set(metadata)
    if others:
        some = ", ".join(sorted(others)[:_NAMED])
        dataset.notes.append(
            f"{len(others)} files that are no images were left out, such as {some}"
        )
    names = dataset.columns.names.get(LABEL)
    if options.prompt is not None:
        if not names:
            raise InputError("--prompt needs a class of each image, and this source has none")
        dataset = with_prompts(dataset, options.prompt, names)
    return dataset


def _records(listing: Listing, images: list[str], metadata: list[str]) -> Iterator[Record | Reject]:
    """A record for each image, with what the metadata of its folder says."""
    keys, has_splits = file_keys(images), by_first_folder(images)
    told: dict[str, Record] = {}
    for one in _told(listing, metadata):
        if isinstance(one, Reject):
            yield one
            continue
        name = _image_of(one, listing)
        if isinstance(name, Reject):
            yield name
        elif name in told:
            message = f"{one.place.file} {one.place.at}: {name} has metadata already"
            yield Reject(one.place, "duplicate-key", message)
        else:
            told[name] = one
    for name in images:
        record = told.get(name)
        given = record.values if record else {}
        values = {_TAKEN.get(one, one): value for one, value in given.items()}
        place = record.place if record else Place(name)
        split, label = _folders(name, has_splits)
        if split is not None:
            values.setdefault(SPLIT, split)
        if label is not None:
            values.setdefault(LABEL, label)
        yield Record({**values, FILE_NAME: name}, place, keys[name])


def _told(listing: Listing, metadata: list[str]) -> Iterator[Record | Reject]:
    for name in metadata:
        if name.endswith(".csv"):
            columns, delimiter = csv_rows.header(listing, name)
            if FILE_NAME not in columns:
                raise InputError(
                    f"{name} line 1: no column {FILE_NAME}; it has {', '.join(columns)}"
                )
            yield from csv_rows.rows_of(listing, name, delimiter)
        else:
            yield from json_lines.lines_in(listing, name)


def _image_of(record: Record, listing: Listing) -> str | Reject:
    """The image that a line of metadata is about."""
    given = record.values.get(FILE_NAME)
    where = f"{record.place.file} {record.place.at}"
    if not isinstance(given, str) or not given:
        message = f"{where}: no {FILE_NAME}; allowed: the name of an image in its folder"
        return Reject(record.place, "missing-image", message)
    name = f"{record.folder}/{given}" if record.folder else given
    if name not in listing.files or not is_image_name(name):
        message = f"{where}: {FILE_NAME} {given!r} is no image in {listing.root}/{record.folder}"
        return Reject(record.place, "missing-image", message.rstrip("/"))
    return name


def _folders(name: str, has_splits: bool) -> tuple[str | None, str | None]:
    """Split and class of an image, by its folders."""
    folders = name.split("/")[:-1]
    split = split_named(folders.pop(0)) if has_splits and folders else None
    return split, "/".join(folders) or None


KIND = Kind("image-folder", "a folder of images, with classes and splits as folders", fits, read)
