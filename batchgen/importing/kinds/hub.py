"""A dataset of the Hugging Face Hub by its id, or a local one, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.importing.kinds.parquet import Part, dataset_from
from batchgen.importing.listing import Listing
from batchgen.importing.rows import Dataset, Kind, Options
from batchgen.importing.splits import split_in

_BATCH_ROWS = 256


def read_hub(name: str, load: Callable[[str], Any] | None = None) -> Dataset:
    """Stream all splits of a dataset.

    Args:
        name: ``owner/name`` on the Hub, or a folder.
        load: returns its splits; by default ``datasets.load_dataset(name, streaming=True)``.

    Raises:
        InputError: `datasets` is not installed, or cannot load it.
    """
    try:
        splits = dict((load or _load)(name))
    except ImportError as error:
        message = "kind hub needs the package datasets; run `pip install 'batchgen[hub]'`"
        raise InputError(message) from error
    except Exception as error:  # datasets raises its own classes, and those of the Hub's client
        said = str(error).partition("\n")[0]
        raise InputError(f"dataset {name}: {type(error).__name__}: {said}") from error
    features = {split: one.features for split, one in splits.items()}
    first = next(iter(splits), "")
    if not splits or any(one is None for one in features.values()):
        raise InputError(
            f"dataset {name}: it declares no columns; download it, and import its files"
        )
    for split, one in features.items():
        if one != features[first]:
            raise InputError(f"dataset {name}: split {split} has other columns than {first}")
    schema = features[first].arrow_schema
    parts = [
        Part(split, split_in(split) or split, partial(_batches, one, schema))
        for split, one in splits.items()
    ]
    return dataset_from(schema, parts)


def _load(name: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, streaming=True)


def _batches(split: Any, schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of a split, with the files of images as they are."""
    for table in split.with_format("arrow").iter(_BATCH_ROWS):
        yield table.cast(schema.remove_metadata())


def read(listing: Listing, options: Options) -> Dataset:
    """Stream the dataset whose id is the source."""
    return read_hub(listing.source)


HUB = Kind("hub", "a dataset of the Hugging Face Hub, by its id", lambda _: False, read)
