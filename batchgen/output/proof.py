"""Checks one committed shard against the plan: its marker, its files and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
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
from batchgen.output.label_proof import CHECKED, label_faults
from batchgen.output.ledger import Ledger, marker_name, rejects_name
from batchgen.output.marker import Counts, Marker
from batchgen.output.planned import (
    Names,
    columns_of,
    constants_of,
    is_planned,
    names_of,
    seeds_of,
    type_text,
)
from batchgen.plan.plan import Plan

SKIPPABLE = ("decode",)
_SAFE = r"^[A-Za-z0-9_-]+$"
_REJECTS = ("key", "source_id", "variant", "outcome")


@dataclass
class Proof:
    """The result of checking one committed shard.

    Attributes:
        shard: its number.
        lost: files that are missing or do not match the checksum in the marker.
        broken: the marker is damaged or was changed: a run would not write it.
        foreign: the marker belongs to another plan.
        problems: one message for everything that is wrong.
        digests: 16 bytes per sample, of its key; empty if the plan proves that keys are unique.
        table: the accepted samples, if they were requested and could be read.
        rejects: the bytes of the file of the rejected and failed samples.
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
        """Whether storage lost or changed committed files, so that regenerating repairs it."""
        return not self.foreign and (self.broken or bool(self.lost))

    def add(self, text: str) -> None:
        self.problems.append(f"shard {self.shard}: {text}")


@dataclass(frozen=True)
class Prover:
    """Checks the shards of one output.

    Attributes:
        sizes: name -> size in bytes of every listed file that a marker may name.
        skip: costly checks to leave out, of SKIPPABLE.
        whole: read all columns of the table, for an export; otherwise only those that are checked.
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
        """The columns that are checked; None for all."""
        names = ("key", "image", "source_id", "variant", "seed", "sha256", "width", "height")
        labels = CHECKED if self.plan.spec.has_labels else ()
        return None if self.whole else {*names, *self.constants, *labels}

    def marker(self, proof: Proof, marker: Marker) -> None:
        """Check the marker, and the names and sizes of its files against the listing."""
        planned = self.plan.samples_of(marker.shard)
        counts = marker.counts
        proof.foreign = not marker.is_of(self.plan)
        if proof.foreign:
            proof.add("belongs to another plan (its marker has other fingerprints)")
        faults = []
        if not counts.add_up() or counts.planned != planned:
            faults.append(
                f"its marker's counts ({_shown(counts)}) do not add up to its {planned} samples"
            )
        strange = [file.name for file in marker.files if not self._is_own(file.name, marker.shard)]
        if strange:
            faults.append(f"its marker names {strange[0]!r}, which is not a file of this shard")
        rows = {file.name: file.rows for file in marker.files}
        if len(rows) < len(marker.files):
            faults.append("its marker names a file twice")
        name = self.form.file_name(marker.shard, self.plan.numbers.stop)
        if name is not None and name not in rows:
            faults.append("its marker names no data file")
        dropped = rows.pop(rejects_name(marker.shard), 0)
        accepted = sum(rows.values())
        if (accepted, dropped) != (counts.accepted, counts.rejected + counts.failed):
            faults.append(
                f"its files hold {accepted} accepted and {dropped} other samples, "
                f"but its counts are {_shown(counts)}"
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
        stop = self.plan.numbers.stop
        return name == rejects_name(shard) or self.form.shard_of(name, stop) == shard

    def listed(self, marker: Marker) -> Proof:
        """Check a shard by its marker and the listings only."""
        proof = Proof(marker.shard)
        self.marker(proof, marker)
        self._name_lost(proof)
        return proof

    def read(self, marker: Marker) -> Proof:
        """Check a shard by reading all of its files."""
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
        """The files that match the marker's checksums; those with another size are not read."""
        contents = {}
        for file in marker.files:
            if file.name in proof.lost:
                continue
            try:
                data = self.ledger.store.read(file.name)
            except (FileNotFoundError, InputError):  # removed meanwhile, or a pipe or device
                proof.lost.append(file.name)
                continue
            if len(data) == file.bytes and hashlib.sha256(data).hexdigest() == file.sha256:
                contents[file.name] = data
            else:
                proof.lost.append(file.name)
        return contents

    def _name_lost(self, proof: Proof) -> None:
        marker = marker_name(proof.shard)
        missing = [name for name in proof.lost if name not in self.sizes]
        changed = [name for name in proof.lost if name in self.sizes]
        for names, what in (
            (missing, f"missing, but {marker} names it"),
            (changed, f"content does not match the checksum in {marker}"),
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
                f"its files hold (accepted, rejected, failed) = {found}, its marker says {told}"
            )
        self._check_names(proof, table, dropped)
        if table.num_rows and not proof.problems:
            self._check_values(proof, table)
            self._check_images(proof, table)
            for text in label_faults(table) if self.plan.spec.has_labels else ():
                proof.add(text)
        if self.whole:
            proof.table = table

    def _check_columns(self, schema: pa.Schema, proof: Proof) -> None:
        found = {one.name: type_text(str(one.type)) for one in schema}
        if len(found) < len(schema):
            proof.add("a column occurs twice")
        for name in [*self.columns, *(name for name in found if name not in self.columns)]:
            wanted, there = self.columns.get(name, "no such column"), found.get(name, "missing")
            if not is_planned(there, wanted):
                proof.add(f"column {name!r} is {there}; planned: {wanted}")

    def _check_names(self, proof: Proof, table: pa.Table, dropped: pa.Table) -> None:
        """Check that the samples are exactly those of the plan, each once, with its key."""
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
            proof.add(f"key {wrong[0] if wrong else 'of a sample'!r} is not a key that a run gives")
            return
        known = keys.cast(pa.binary()).to_pylist()
        proof.digests = b"".join([hashlib.blake2b(key, digest_size=16).digest() for key in known])

    def _check_values(self, proof: Proof, table: pa.Table) -> None:
        """Check the columns whose values follow from the plan."""
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
        """Check that images match their rows' checksums and can be decoded at their rows' size."""
        data = [one for chunk in table.column("image").chunks for one in _slices(chunk)]
        digests = pa.array([hashlib.sha256(one).hexdigest() for one in data], pa.string())
        wanted = table.column("sha256").combine_chunks()
        keys = table.column("key").to_pylist()
        if not digests.equals(wanted):
            pairs = zip(keys, digests.to_pylist(), wanted.to_pylist(), strict=True)
            wrong = [key for key, one, other in pairs if one != other]
            proof.add(f"image {_some(wrong)} does not match its sha256 column")
            return
        if "decode" in self.skip:
            return
        sides = zip(*(table.column(name).to_pylist() for name in ("width", "height")), strict=True)
        for key, image, size in zip(keys, data, sides, strict=True):
            found = size_of(image, size)
            if found != size:
                proof.add(f"image {key} {_decoded(found)}; its row says {size[0]} x {size[1]}")


_NO_REJECTS = pa.table({name: pa.array([], pa.string()) for name in _REJECTS})


def _shown(counts: Counts) -> str:
    return ", ".join(f"{name} {count}" for name, count in asdict(counts).items())


def _decoded(found: tuple[int, int] | None) -> str:
    return "cannot be decoded" if found is None else f"has {found[0]} x {found[1]} pixels"


def _places(names: Names, sources: pa.Array, variants: pa.Array) -> pa.Array | None:
    """Each sample's position in the plan; None unless all planned samples are there, each once."""
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
    """A message for each difference between the samples and the planned ones."""
    wanted = list(zip(names.sources.to_pylist(), names.variants.to_pylist(), strict=True))
    found = list(zip(sources.to_pylist(), variants.to_pylist(), strict=True))
    there, known = set(found), set(wanted)
    missing = [one for one in wanted if one not in there]
    if missing:
        yield f"planned sample {_some(missing)} is missing"
    extra = [one for one in found if one not in known]
    if extra:
        yield f"sample {_some(extra)} was never planned"
    if len(there) < len(found):
        yield "a sample occurs twice"


def _some(found: list[Any]) -> str:
    """The first one, and the number of the others."""
    return f"{found[0]} (and {len(found) - 1} more)" if found[1:] else str(found[0])


def _compare(proof: Proof, name: str, keys: pa.Array, found: pa.Array, wanted: pa.Array) -> None:
    """Add a problem if a column differs from what the plan decides."""
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
    """The bytes of each image, without a copy; empty for a null image."""
    data = images.field("bytes")
    whole = memoryview(data.buffers()[2] or b"")
    ends = np.frombuffer(data.buffers()[1], np.int32)[data.offset : data.offset + len(data) + 1]
    stops = ends.tolist()
    return (whole[start:stop] for start, stop in pairwise(stops))
