"""WebDataset: one tar per shard, in which the files of a sample are adjacent and share its key."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from batchgen.output.formats import json_rows
from batchgen.output.formats.format import DataFile, chosen, loading, schema_file, schema_of
from batchgen.output.formats.tables import image_extension
from batchgen.output.ledger import DATA
from batchgen.spec.spec import Spec
from batchgen.storage import Store

_NAME = re.compile(r"data/(\d{5,})\.tar")
_MASK = "seg.png"


class WebDataset:
    """The format ``webdataset``: ``key.png``, ``key.json``, ``key.txt`` and ``key.cls``.

    Readers parse ``cls`` as an integer and fail on anything else, so only integer labels have such
    a file. The JSON has every label. A label mask is ``key.seg.png``.
    """

    def data_files(self) -> str:
        return "data/*.tar"

    def how_to_load(self, spec: Spec, names: Sequence[str] = ()) -> str:
        image = image_extension(spec)
        shown = f'images[0]["{image}"], images[0]["json"]["prompt"]'
        return loading("webdataset", self.data_files(), shown, "cls", names)

    def file_name(self, shard: int, shards: int) -> str | None:
        return f"{DATA}/{shard:05d}.tar"

    def is_ours(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def shard_of(self, name: str, shards: int) -> int | None:
        found = _NAME.fullmatch(name)
        shard = int(found.group(1)) if found else -1
        return shard if 0 <= shard < shards and name == self.file_name(shard, shards) else None

    def files(self, table: pa.Table, shard: int, shards: int) -> Iterator[DataFile]:
        yield schema_file(table.schema)
        yield DataFile(f"{DATA}/{shard:05d}.tar", _tar(_members(table)), table.num_rows)

    def read(self, files: Mapping[str, bytes], columns: Container[str] | None = None) -> pa.Table:
        tars = [data for name, data in files.items() if name.startswith(f"{DATA}/")]
        rows, images, masks = [], [], []
        for data in tars:
            for key, members in _samples(io.BytesIO(data)):
                if "json" not in members:
                    raise ValueError(f"sample {key} has no {key}.json")
                rows.append(json.loads(members["json"]))
                name = _image_of(key, members)
                images.append({"bytes": members[name], "path": f"{key}.{name}"})
                masks.append(members.get(_MASK))
        return json_rows.table_of(rows, images, chosen(schema_of(files), columns), masks)

    def schema(self, files: Mapping[str, bytes]) -> pa.Schema:
        return schema_of(files)

    def peek(self, store: Store, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        for name in names:
            with store.open(name) as file:
                for key, members in islice(_samples(file), count):
                    row = json.loads(members["json"])
                    yield {**row, "image": members[_image_of(key, members)]}


def _members(table: pa.Table) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the files of all samples; of each sample the image first."""
    numbered = pa.types.is_integer(table.schema.field("label").type)
    for row, path, image, mask in json_rows.samples(table):
        yield path, image
        if mask is not None:
            yield f"{row['key']}.{_MASK}", mask
        yield f"{row['key']}.json", json_rows.line(row)
        yield f"{row['key']}.txt", (row["prompt"] or "").encode()
        if numbered and row["label"] is not None:
            yield f"{row['key']}.cls", str(row["label"]).encode()


def _tar(members: Iterator[tuple[str, bytes]]) -> bytes:
    """An archive without times and owners, so that equal members give equal bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)  # defaults: time 0, owner 0 without a name, mode 0644
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and the members by extension, for each run of members with one key."""
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                stem, _, extension = info.name.partition(".")
                if stem != key:
                    if members:
                        yield key, members
                    key, members = stem, {}
                if extension in members:
                    raise ValueError(f"member {info.name} occurs twice")
                handle = archive.extractfile(info)
                members[extension] = handle.read() if handle else b""
    except tarfile.TarError as error:
        raise ValueError(f"its tar is damaged or incomplete: {error}") from error
    if members:
        yield key, members


def _image_of(key: str, members: Mapping[str, bytes]) -> str:
    """The extension of a sample's image."""
    found = [name for name in json_rows.EXTENSIONS if name in members]
    if len(found) != 1:
        raise ValueError(f"sample {key} has {len(found)} images; expected 1")
    return found[0]
