"""What an output format is: how a shard's accepted samples become files, and samples again."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from batchgen.errors import BatchgenError
from batchgen.spec.spec import Spec
from batchgen.storage import Store

SCHEMAS = "_batchgen/schemas"
# What reading the files of a stranger may raise, whatever stands in them.
UNREADABLE = (
    *(BatchgenError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, pa.ArrowException),
)


@dataclass(frozen=True)
class DataFile:
    """One file of a shard: name below the output, bytes, and for how many samples it has a row.

    Over the files of a shard the rows add up to its accepted samples: an image has none where a
    file beside it has the rows.
    """

    name: str
    data: bytes
    rows: int


class Format(Protocol):
    """A form of the data files. The commit protocol around them is the same for all."""

    def data_files(self) -> str:
        """Glob of the data files below the output, for the dataset card."""
        ...

    def how_to_load(self, spec: Spec) -> str:
        """Python that loads an output of this format, for the dataset card."""
        ...

    def file_name(self, shard: int, shards: int) -> str | None:
        """The data file that every shard has; None where a shard may have any number of them."""
        ...

    def shard_of(self, name: str, shards: int) -> int | None:
        """The shard that writes a file of this name into ``data/``; None if no run does."""
        ...

    def files(self, table: pa.Table, shard: int, shards: int) -> Iterator[DataFile]:
        """The files of a shard in the order to put them, one at a time; equal for equal tables."""
        ...

    def read(self, files: Mapping[str, bytes], columns: Container[str] | None = None) -> pa.Table:
        """The table that ``files`` was given, from the files of one shard in their order.

        Args:
            files: all that the shard's marker names but its rejects.
            columns: only these; default: all.

        Raises:
            UNREADABLE: the files do not belong together, or are not what a run writes.
        """
        ...

    def schema(self, files: Mapping[str, bytes]) -> pa.Schema:
        """The columns of that table; raises as ``read``."""
        ...

    def peek(self, store: Store, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """``key``, ``prompt``, ``label`` and ``image`` (bytes) of some samples of a shard.

        Reads no further than needed.
        """
        ...


def schema_file(schema: pa.Schema) -> DataFile:
    """The columns' Arrow types, for formats whose own files cannot tell them.

    Named for its content, so that shards share it and none depends on another.
    """
    data = schema.serialize().to_pybytes()
    return DataFile(f"{SCHEMAS}/{hashlib.sha256(data).hexdigest()[:16]}.arrow", data, 0)


def schema_of(files: Mapping[str, bytes]) -> pa.Schema:
    """The schema among a shard's files. Raises ValueError where there is none."""
    found = [data for name, data in files.items() if name.startswith(f"{SCHEMAS}/")]
    if not found:
        raise ValueError(f"no file of {SCHEMAS} is among its files")
    return pa.ipc.read_schema(pa.py_buffer(found[0]))


def chosen(schema: pa.Schema, columns: Container[str] | None) -> pa.Schema:
    """The schema with these columns alone."""
    fields = [field for field in schema if columns is None or field.name in columns]
    return pa.schema(fields, schema.metadata)


def loading(builder: str, files: str, shown: str) -> str:
    """Python for the dataset card that loads all of the files with Hugging Face's builder.

    They are named as one split: found by itself, ``datasets`` would take files and folders whose
    names hold ``train``, ``test``, ``dev`` and the like for splits, and leave out the others.
    """
    return f"""from datasets import load_dataset

folder = "."  # this dataset's folder or URL
files = {{"train": f"{{folder}}/{files}"}}
images = load_dataset("{builder}", data_files=files, split="train")
{shown}"""
