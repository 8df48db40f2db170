"""The interface of an output format: writes a shard's accepted samples as files and reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from batchgen.errors import BatchgenError
from batchgen.spec.spec import Spec
from batchgen.storage import Store

SCHEMAS = "_batchgen/schemas"
PEEKED = ("key", "prompt", "label", "image", "width", "height", "objects")
# Exceptions that reading files of unknown origin may raise, whatever they contain.
UNREADABLE = (
    *(BatchgenError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, pa.ArrowException),
)


@dataclass(frozen=True)
class DataFile:
    """One file of a shard: its name in the output, its bytes and its number of rows.

    The rows of a shard's files add up to its accepted samples. An image file has no row if another
    file of the shard has the rows.
    """

    name: str
    data: bytes
    rows: int


class Format(Protocol):
    """An output format. The commit protocol is the same for all formats."""

    def data_files(self) -> str:
        """Glob pattern of the data files in the output, for the dataset card."""
        ...

    def how_to_load(self, spec: Spec, names: Sequence[str] = ()) -> str:
        """Python code that loads an output of this format, for the dataset card.

        ``names``: those of the labels, if the input declares them; Parquet has them in its files.
        """
        ...

    def file_name(self, shard: int, shards: int) -> str | None:
        """The data file that every shard has; None if a shard may have any number of files."""
        ...

    def is_ours(self, name: str) -> bool:
        """Whether a run of any plan in this format could have written a file of this name."""
        ...

    def shard_of(self, name: str, shards: int) -> int | None:
        """The shard to which a file of this name in ``data/`` belongs; None if to no shard."""
        ...

    def files(self, table: pa.Table, shard: int, shards: int) -> Iterator[DataFile]:
        """Yields the files of a shard in the order to write them; the same for equal tables."""
        ...

    def read(self, files: Mapping[str, bytes], columns: Container[str] | None = None) -> pa.Table:
        """The inverse of ``files``: the table, from the files of one shard in their order.

        Args:
            files: all files that the shard's marker names, except its rejects.
            columns: names of the columns to read; default: all.

        Raises:
            UNREADABLE: the files do not belong together, or a run would not write them so.
        """
        ...

    def schema(self, files: Mapping[str, bytes]) -> pa.Schema:
        """The schema of that table; raises the same as ``read``."""
        ...

    def peek(self, store: Store, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """The columns PEEKED of some samples of a shard, if it has them; ``image`` as bytes.

        There may be others. It reads as little as possible.
        """
        ...


def schema_file(schema: pa.Schema) -> DataFile:
    """A file with the columns' Arrow types, for formats whose files cannot store them.

    Its name is a hash of its content, so that shards can share it without depending on each other.
    """
    data = schema.serialize().to_pybytes()
    return DataFile(f"{SCHEMAS}/{hashlib.sha256(data).hexdigest()[:16]}.arrow", data, 0)


def schema_of(files: Mapping[str, bytes]) -> pa.Schema:
    """The schema from a shard's files. Raises ValueError if there is none."""
    found = [data for name, data in files.items() if name.startswith(f"{SCHEMAS}/")]
    if not found:
        raise ValueError(f"it has no schema file: its marker names no file in {SCHEMAS}")
    return pa.ipc.read_schema(pa.py_buffer(found[0]))


def chosen(schema: pa.Schema, columns: Container[str] | None) -> pa.Schema:
    """The schema with only these columns."""
    fields = [field for field in schema if columns is None or field.name in columns]
    return pa.schema(fields, schema.metadata)


def label_names(schema: pa.Schema) -> list[str]:
    """The names of the column ``label``, if the input declares it as a ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []


def loading(
    builder: str, files: str, shown: str, column: str = "label", names: Sequence[str] = ()
) -> str:
    """Python code for the dataset card that loads all files with a Hugging Face builder.

    With ``names``, it gives the numbers of this column the names of their classes.

    It names them as one split. Otherwise ``datasets`` would treat files and folders with ``train``,
    ``test``, ``dev`` and the like in their names as splits, and leave out the others.
    """
    told = ", ".join(json.dumps(name) for name in names)
    cast = f'\nimages = images.cast_column("{column}", ClassLabel(names=[{told}]))'
    return f"""from datasets import {"ClassLabel, " if names else ""}load_dataset

folder = "."  # this dataset's folder or URL
files = {{"train": f"{{folder}}/{files}"}}
images = load_dataset("{builder}", data_files=files, split="train"){cast if names else ""}
{shown}"""
