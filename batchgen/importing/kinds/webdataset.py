"""WebDataset: tar files, in which the files of a sample are adjacent and share its key.

Format: https://github.com/webdataset/webdataset, the key is all before the first dot of the name.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchgen.importing.inference import Kinds
from batchgen.importing.kinds.json_lines import parsed
from batchgen.importing.listing import READ_LIMIT_BYTES, Listing, is_image_name
from batchgen.importing.pictures import Pictures
from batchgen.importing.records import IMAGES, SPLIT, Record, dataset_of
from batchgen.importing.rows import KEY, Dataset, Kind, Options, Place, Refused, Reject
from batchgen.importing.splits import split_in
from batchgen.plan.keys import safe_key

ENDINGS = (".tar", ".tar.gz", ".tgz")
_SAMPLE_LIMIT_BYTES = 4 * READ_LIMIT_BYTES  # all files of a sample are in memory
_MASKS = ("seg", "mask", "label_mask", "control")  # x.seg.png is the label mask of x
_COLUMNS = {"seg": "label_mask"}


@dataclass
class _Sample:
    """The members of a sample: extension in small letters -> bytes, or why they are not read."""

    key: str
    tar: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: Refused | None = None


def fits(listing: Listing) -> bool:
    """Whether there is a tar; img2dataset writes a Parquet file of the same rows next to each."""
    return bool(listing.named(*ENDINGS))


def read(listing: Listing, options: Options) -> Dataset:
    """Read all tars; images are copied, since a row cannot refer to a member of a tar."""
    names = listing.named(*ENDINGS) or list(listing.files)
    pictures = Pictures(listing, "bytes", options.image_root)
    others: dict[str, int] = {}
    dataset = dataset_of(partial(_records, listing, names, others), Kinds, pictures)
    dataset.unique = False
    left = ", ".join(f".{name} ({count})" for name, count in sorted(others.items()))
    if left:
        dataset.notes.append(f"members of the samples that were left out: {left}")
    return dataset


def _records(
    listing: Listing, names: list[str], others: dict[str, int]
) -> Iterator[Record | Reject]:
    others.clear()
    splits = {name: split_in(name) for name in names}
    has_splits = all(splits.values())
    for name in names:
        for sample in _samples(listing, name):
            if isinstance(sample, Reject):
                yield sample
                continue
            try:
                yield _record(sample, splits[name] if has_splits else None, others)
            except Refused as error:
                place = Place(name, f"sample {sample.key}")
                yield Reject(place, error.reason, str(error), safe_key(sample.key))


def _record(sample: _Sample, split: str | None, others: dict[str, int]) -> Record:
    if sample.fault is not None:
        raise sample.fault
    where = f"{sample.tar} sample {sample.key}"
    values: dict[str, Any] = {SPLIT: split} if split else {}
    loaded: dict[str, tuple[bytes, str]] = {}
    for extension, data in sample.members.items():
        first, _, rest = extension.rpartition(".")
        column = _COLUMNS.get(first, first) if first in _MASKS else "image"
        if is_image_name(f"x.{rest}") and (column != "image" or not first):
            if column in loaded:
                message = f"{where}: two images .{extension} and {loaded[column][1]}"
                raise Refused("no-image", f"{message}; allowed: one image for each sample")
            loaded[column] = data, f"{sample.key}.{extension}"
        elif extension == "json":
            values |= _plain(parsed(data, f"{where}, its json"))
        elif extension == "txt":
            values["prompt"] = _text(data, f"{where}, its txt")
        elif extension == "cls":
            values["label"] = _number(data, f"{where}, its cls")
        else:
            others[extension] = others.get(extension, 0) + 1
    if not loaded and not values:
        raise Refused("no-image", f"{where}: it has only {', '.join(sample.members)}")
    key = safe_key(str(values.pop(KEY, None) or sample.key))
    return Record(values, Place(sample.tar, f"sample {sample.key}"), key, loaded)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample's JSON; its images are members of the tar."""
    return {name: value for name, value in values.items() if name not in IMAGES}


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise Refused("not-utf8", f"{where}: {error}; allowed: UTF-8") from error


def _number(data: bytes, where: str) -> int | str:
    """A class: its number, or its name."""
    text = _text(data, where)
    return int(text) if text.lstrip("-").isdecimal() and len(text) < 19 else text


def _samples(listing: Listing, name: str) -> Iterator[_Sample | Reject]:
    """The samples of a tar; a damaged one ends with a refused entry."""
    sample, count = None, 0
    try:
        with listing.open(name) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for info in archive:
                folder, slash, last = info.name.rpartition("/")
                stem, dot, extension = last.partition(".")
                if not info.isfile() or not dot or not stem:
                    continue
                key = folder + slash + stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                        count += 1
                    sample = _Sample(key, name)
                _add(sample, extension.lower(), info, archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        message = f"{name}: damaged after {count:,} samples ({error}); allowed: a complete tar"
        yield Reject(Place(name, f"after sample {count}"), "damaged-file", message)
        return
    if sample is not None:
        yield sample


def _add(sample: _Sample, extension: str, info: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Read a member into its sample; a large one is not read."""
    if info.size > READ_LIMIT_BYTES:
        message = f"{sample.tar}: {info.name} has {info.size:,} bytes"
        sample.fault = Refused("image-too-large", f"{message}; allowed: {READ_LIMIT_BYTES:,}")
        return
    if sum(map(len, sample.members.values())) + info.size > _SAMPLE_LIMIT_BYTES:
        message = f"{sample.tar}: the files of {sample.key} have more than"
        sample.fault = Refused("image-too-large", f"{message} {_SAMPLE_LIMIT_BYTES:,} bytes")
        return
    if extension in sample.members:
        sample.fault = Refused("duplicate-key", f"{sample.tar}: {info.name} is there twice")
        return
    handle = archive.extractfile(info)
    sample.members[extension] = handle.read() if handle else b""


KIND = Kind("webdataset", "WebDataset: tar files of samples", fits, read)
