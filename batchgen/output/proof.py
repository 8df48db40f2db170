"""Proves one committed shard: its marker, its files, and all of its rows that the plan decides."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import BatchgenError, InputError
from batchgen.images.files import size_of
from batchgen.output.formats import (
    SCHEMAS,
    UNREADABLE,
    Format,
    format_of,
    image_extension,
    read_parquet,
)
from batchgen.output.ledger import SHARDS, Ledger, Marker, rejects_name
from batchgen.output.planned import Names, columns_of, constants_of, names_of, seeds_of, type_text
from batchgen.plan.plan import Plan

SKIPPABLE = ("decode",)
_SAFE = r"^[A-Za-z0-9_-]+$"
_REJECTS = ("key", "source_id", "variant", "outcome")


@dataclass
class Proof:
    """One committed shard as it was read back.

    Attributes:
        shard: its number.
        lost: files that are missing, or have not the bytes that the marker names.
        broken: the marker is none that a run writes: damaged, or changed.
        foreign: it was made for another plan.
        problems: everything that is wrong, in words.
        digests: 16 bytes for each sample, of its key; empty where the plan proves keys unique.
        table: the accepted samples, if they could be read and were asked for.
        rejects: the file of the others.
    """

    shard: int
    lost: list[str] = field(default_factory=list)
    broken: bool = False
    foreign: bool = False
    problems: list[str] = field(default_factory=list)
    digests: bytes = b""
    table: pa.Table | None = None
    rejects: bytes | None = None

    @property
    def damaged(self) -> bool:
        """Storage has lost or changed what was committed, so that making it again mends it."""
        return not self.foreign and (self.broken or bool(self.lost))

    def add(self, text: str) -> None:
        self.problems.append(f"shard {self.shard}: {text}")


@dataclass(frozen=True)
class Prover:
    """Proves the shards of one output, from listings and what is read.

    Attributes:
        sizes: name -> bytes of every file that markers may name, as listed.
        skip: costly checks to leave out, of SKIPPABLE.
        whole: keep all columns of the table, for an export; else those that are checked.
    """

    ledger: Ledger
    plan: Plan
    sizes: Mapping[str, int]
    skip: Collection[str] = ()
    whole: bool = False

    @cached_property
    def form(self) -> Format:
        return format_of(self.plan)

    @cached_property
    def constants(self) -> dict[str, Any]:
        return constants_of(self.plan)

    @cached_property
    def columns(self) -> dict[str, str]:
        return columns_of(self.plan)

    @cached_property
    def needed(self) -> set[str] | None:
        """The columns that are looked at."""
        names = ("key", "image", "source_id", "variant", "seed", "sha256", "width", "height")
        return None if self.whole else {*names, *self.constants}

    def marker(self, proof: Proof, marker: Marker) -> None:
        """The marker by itself, and against the listing."""
        planned = self.plan.samples_of(marker.shard)
        counts = marker.counts
        proof.foreign = not marker.is_of(self.plan)
        if proof.foreign:
            proof.add("was made for another plan (its marker has other fingerprints)")
        faults = []
        if not counts.add_up() or counts.planned != planned:
            faults.append(f"counts {counts} do not add up to its {planned}")
        strange = [file.name for file in marker.files if not self._is_own(file.name, marker.shard)]
        if strange:
            faults.append(f"its marker names {strange[0]!r}, which no run writes for it")
        rows = {file.name: file.rows for file in marker.files}
        if len(rows) < len(marker.files):
            faults.append("its marker names a file twice")
        name = self.form.file_name(marker.shard, self.plan.shards)
        if name is not None and name not in rows:
            faults.append("its marker names no data file")
        dropped = rows.pop(rejects_name(marker.shard), 0)
        accepted = sum(rows.values())
        if (accepted, dropped) != (counts.accepted, counts.rejected + counts.failed):
            faults.append(
                f"its files hold {accepted} accepted and {dropped} other samples, its counts are "
                f"{counts}"
            )
        for fault in faults:
            proof.add(fault)
        proof.broken = bool(faults)
        if not strange:
            proof.lost += [
                file.name for file in marker.files if self.sizes.get(file.name) != file.bytes
            ]

    def _is_own(self, name: str, shard: int) -> bool:
        if name.startswith(f"{SCHEMAS}/"):
            return name.count("/") == 2 and name.endswith(".arrow")
        return name == rejects_name(shard) or self.form.shard_of(name, self.plan.shards) == shard

    def listed(self, marker: Marker) -> Proof:
        """The proof of a shard from its marker and listings alone."""
        proof = Proof(marker.shard)
        self.marker(proof, marker)
        self._name_lost(proof)
        return proof

    def read(self, marker: Marker) -> Proof:
        """The proof of a shard from all of its bytes."""
        proof = Proof(marker.shard)
        self.marker(proof, marker)
        contents = {} if proof.broken else self._contents(marker, proof)
        self._name_lost(proof)
        if proof.broken or proof.lost:
            return proof
        try:
            self._rows(marker, contents, proof)
        except UNREADABLE as error:
            told = str(error) if isinstance(error, BatchgenError | ValueError) else repr(error)
            proof.add(told)
        return proof

    def _contents(self, marker: Marker, proof: Proof) -> dict[str, bytes]:
        """The marker's files that have the bytes it names; those of another size are not read."""
        contents = {}
        for file in marker.files:
            if file.name in proof.lost:
                continue
            try:
                data = self.ledger.store.read(file.name)
            except (FileNotFoundError, InputError):  # gone meanwhile, or a pipe or device
                proof.lost.append(file.name)
                continue
            if len(data) == file.bytes and hashlib.sha256(data).hexdigest() == file.sha256:
                contents[file.name] = data
            else:
                proof.lost.append(file.name)
        return contents

    def _name_lost(self, proof: Proof) -> None:
        marker = f"{SHARDS}/{proof.shard:05d}.json"
        missing = [name for name in proof.lost if name not in self.sizes]
        changed = [name for name in proof.lost if name in self.sizes]
        for names, what in (
            (missing, f"missing, though {marker} names it"),
            (changed, f"not the bytes that {marker} names"),
        ):
            if names:
                more = f" (and {len(names) - 1} more files of shard {proof.shard})"
                proof.problems.append(f"{names[0]}: {what}{more if names[1:] else ''}")

    def _rows(self, marker: Marker, contents: dict[str, bytes], proof: Proof) -> None:
        rejects = contents.pop(rejects_name(marker.shard), None)
        proof.rejects = rejects
        self._check_columns(self.form.schema(contents), proof)
        if proof.problems:
            return
        table = self.form.read(contents, self.needed)
        dropped = _NO_REJECTS if rejects is None else read_parquet(rejects, list(_REJECTS))
        told = (marker.counts.accepted, marker.counts.rejected, marker.counts.failed)
        outcomes = dropped.column("outcome").to_pylist()
        found = (table.num_rows, outcomes.count("rejected"), outcomes.count("failed"))
        if found != told:
            proof.add(
                f"(accepted, rejected, failed) are {found} in its files, {told} in its marker"
            )
        self._check_names(proof, table, dropped)
        if table.num_rows and not proof.problems:
            self._check_values(proof, table)
            self._check_images(proof, table)
        if self.whole:
            proof.table = table

    def _check_columns(self, schema: pa.Schema, proof: Proof) -> None:
        found = {one.name: type_text(str(one.type)) for one in schema}
        if len(found) < len(schema):
            proof.add("a column stands twice")
        for name in [*self.columns, *(name for name in found if name not in self.columns)]:
            wanted, there = self.columns.get(name, "none"), found.get(name, "missing")
            if wanted != there:
                proof.add(f"column {name!r} is {there}; planned: {wanted}")

    def _check_names(self, proof: Proof, table: pa.Table, dropped: pa.Table) -> None:
        """The samples are those of the plan, each once, under their keys."""
        names = names_of(self.plan, proof.shard)
        both = [
            pa.concat_arrays(
                [chunk.cast(kind) for one in (table, dropped) for chunk in one.column(name).chunks]
                or [pa.array([], kind)]
            )
            for name, kind in (
                ("source_id", pa.string()),
                ("variant", pa.int32()),
                ("key", pa.string()),
            )
        ]
        sources, variants, keys = both
        places = _places(names, sources, variants)
        if places is None:
            for text in _sample_faults(names, sources, variants):
                proof.add(text)
            return
        if names.keys is not None:
            _compare(proof, "key", keys, keys, names.keys.take(places))
            return
        bare = pc.all(pc.match_substring_regex(keys, _SAFE)).as_py()
        pairs = zip(keys.to_pylist(), variants.to_pylist(), strict=True)
        wrong = [key for key, one in pairs if key is None or not key.endswith(f"-v{one}")]
        if wrong or bare is False:
            proof.add(f"key {wrong[0] if wrong else 'of a sample'!r} is none that a run gives")
            return
        known = keys.cast(pa.binary()).to_pylist()
        proof.digests = b"".join([hashlib.blake2b(key, digest_size=16).digest() for key in known])

    def _check_values(self, proof: Proof, table: pa.Table) -> None:
        """What the plan decides of every row."""
        keys = table.column("key").combine_chunks()
        for name, value in self.constants.items():
            column = table.column(name).combine_chunks()
            _compare(proof, name, keys, column, _repeated(value, column.type, len(column)))
        if "seed" not in self.plan.spec.input.columns.mapped():
            seeds = seeds_of(self.plan, keys.cast(pa.binary()).to_pylist())
            _compare(proof, "seed", keys, table.column("seed").combine_chunks(), seeds)
        extension = image_extension(self.plan.spec)
        paths = pc.binary_join_element_wise(keys, extension, ".")
        images = table.column("image").combine_chunks()
        _compare(proof, "image.path", keys, images.field("path"), paths)

    def _check_images(self, proof: Proof, table: pa.Table) -> None:
        """The images are those of their rows, and can be decoded at their size."""
        data = [one for chunk in table.column("image").chunks for one in _slices(chunk)]
        digests = pa.array([hashlib.sha256(one).hexdigest() for one in data], pa.string())
        wanted = table.column("sha256").combine_chunks()
        keys = table.column("key").to_pylist()
        if not digests.equals(wanted):
            pairs = zip(keys, digests.to_pylist(), wanted.to_pylist(), strict=True)
            wrong = [key for key, one, other in pairs if one != other]
            proof.add(f"image {_some(wrong)} is not the bytes of its sha256 column")
            return
        if "decode" in self.skip:
            return
        sides = zip(*(table.column(name).to_pylist() for name in ("width", "height")), strict=True)
        for key, image, size in zip(keys, data, sides, strict=True):
            found = size_of(image, size)
            if found != size:
                proof.add(f"image {key} {_decoded(found)}; its row says {size[0]} x {size[1]}")


_NO_REJECTS = pa.table({name: pa.array([], pa.string()) for name in _REJECTS})


def _decoded(found: tuple[int, int] | None) -> str:
    return "cannot be decoded" if found is None else f"has {found[0]} x {found[1]} pixels"


def _places(names: Names, sources: pa.Array, variants: pa.Array) -> pa.Array | None:
    """Of each sample its place in the plan; None unless they are all of them, each once."""
    if len(sources) != len(names.sources):
        return None
    numbers = pa.array(np.arange(len(sources)))
    if sources.equals(names.sources) and variants.equals(names.variants):
        return numbers
    found, wanted = (
        pc.binary_join_element_wise(one, two.cast(pa.string()), "#")
        for one, two in ((sources, variants), (names.sources, names.variants))
    )
    places = pc.index_in(found, wanted)
    if places.null_count or len(pc.unique(places)) != len(places):
        return None
    return places


def _sample_faults(names: Names, sources: pa.Array, variants: pa.Array) -> Iterator[str]:
    """In words what keeps the samples from being the planned ones."""
    wanted = list(zip(names.sources.to_pylist(), names.variants.to_pylist(), strict=True))
    found = list(zip(sources.to_pylist(), variants.to_pylist(), strict=True))
    there, known = set(found), set(wanted)
    missing = [one for one in wanted if one not in there]
    if missing:
        yield f"planned sample {_some(missing)} is nowhere"
    extra = [one for one in found if one not in known]
    if extra:
        yield f"sample {_some(extra)} was never planned"
    if len(there) < len(found):
        yield "a sample stands twice"


def _some(found: list[Any]) -> str:
    """The first, and how many more."""
    return f"{found[0]} (and {len(found) - 1} more)" if found[1:] else str(found[0])


def _compare(proof: Proof, name: str, keys: pa.Array, found: pa.Array, wanted: pa.Array) -> None:
    """A problem, where a column is not what the plan makes of it."""
    if found.equals(wanted):
        return
    pairs = zip(keys.to_pylist(), found.to_pylist(), wanted.to_pylist(), strict=True)
    wrong = [(key, one, other) for key, one, other in pairs if one != other]
    if wrong:
        key, one, other = wrong[0]
        more = f" (and {len(wrong) - 1} more samples)" if wrong[1:] else ""
        proof.add(f"sample {key}: {name} is {one!r}, planned: {other!r}{more}")


def _repeated(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    if value is None:
        return pa.nulls(count, kind)
    if pa.types.is_nested(kind):
        return pa.array([value] * count, kind)
    return pa.repeat(pa.scalar(value, kind), count)


def _slices(images: pa.StructArray) -> Iterator[memoryview]:
    """The bytes of each image, without a copy; none of one that is null."""
    data = images.field("bytes")
    whole = memoryview(data.buffers()[2] or b"")
    ends = np.frombuffer(data.buffers()[1], np.int32)[data.offset : data.offset + len(data) + 1]
    stops = ends.tolist()
    return (whole[start:stop] for start, stop in pairwise(stops))
