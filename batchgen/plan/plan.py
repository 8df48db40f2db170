"""The plan: the written mapping from spec and input to shards, made from Parquet footers.

Nothing is enumerated. The rows of all files are numbered in order; with V variants, sample g is
variant ``g % V`` of row ``g // V``; with S samples in a shard, shard k is samples ``k*S`` to
``(k+1)*S - 1``. So a plan of a billion rows is as small as its list of files, and anyone can check
it by arithmetic.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import __version__
from batchgen.errors import InputError, SpecError
from batchgen.plan.checks import (
    check_approximations,
    check_columns,
    check_fit,
    refuse_idle_settings,
    settle,
)
from batchgen.plan.choices import chosen
from batchgen.plan.keys import row_key
from batchgen.plan.labels import check_labels, label_notes
from batchgen.plan.place import FIRST, Listing, Place, source_name
from batchgen.plan.splits import split_notes, with_split_column
from batchgen.plan.unique_keys import refuse_duplicate_keys
from batchgen.records import DeviceInfo, ModelInfo
from batchgen.spec.spec import Spec
from batchgen.spec.tree import canonical_json
from batchgen.storage import Stat, find_files, is_within, open_input
from batchgen.storage.documents import Count

VERSION = 2
COUNTED_COLUMN = "row"
COUNTED_GROUP = 65_536
_FOOTER_THREADS = 16
_TOLD = (b"huggingface", b"batchgen")  # metadata of the input that declares what columns hold


@dataclass(frozen=True)
class SourceFile:
    """One input file. ``name`` is its path under the input; ``row_groups`` are row counts."""

    path: str
    name: str
    size: Count
    etag: str
    row_groups: tuple[Count, ...]

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of a plan's spec, of its input, and of the complete plan with the model's weights."""

    spec: str
    input: str
    plan: str


@dataclass(frozen=True)
class Frozen:
    """Facts about a plan that was read from an output.

    Attributes:
        fingerprints: as they were written. Markers hold them, and a later version may compute
            others, since its spec has more fields.
        unknown: fields of its spec that this version does not have.
        unmarked: an early version wrote it, before plans had a fingerprint and image folders had
            portable file names.
    """

    fingerprints: Fingerprints
    unknown: tuple[str, ...] = ()
    unmarked: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that decides which samples exist, and fingerprints of their sources.

    A plan is one part of its output: the first, or one that ``place`` numbers on from those before
    it. A part that lists its samples has them in ``listing``, which is in a file of its own.
    ``device`` is not saved: it is that of the machine or cluster for which the plan was made, None
    if it was not asked. Neither are ``notes``, which a user should read before the run.
    """

    spec: Spec
    model: ModelInfo
    files: tuple[SourceFile, ...]
    columns: tuple[tuple[str, str], ...]
    rows: int
    frozen: Frozen | None = field(default=None, compare=False)
    place: Place = FIRST
    listing: Listing | None = field(default=None, compare=False)
    device: DeviceInfo | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def samples(self) -> int:
        return self.rows * self.spec.variants

    @property
    def shards(self) -> int:
        return -(-self.samples // self.spec.output.samples_per_shard)

    @property
    def numbers(self) -> range:
        """The numbers of its shards, which are counted through all parts of the output."""
        return range(self.place.first_shard, self.place.first_shard + self.shards)

    @property
    def plans(self) -> tuple[Plan, ...]:
        return (self,)

    def of(self, shard: int) -> Plan:
        """The part that has the shard: this one; see ``parts.Parts``."""
        return self

    def sample_range(self, shard: int) -> tuple[int, int]:
        """Return the first sample of the shard, and one past its last, counted from this part's."""
        size, number = self.spec.output.samples_per_shard, shard - self.place.first_shard
        return number * size, min((number + 1) * size, self.samples)

    def samples_of(self, shard: int) -> int:
        """Return the number of samples of the shard."""
        first, stop = self.sample_range(shard)
        return stop - first

    def samples_in(self, numbers: range) -> int:
        """Return the number of samples of those of these shards that the part has."""
        first = max(numbers.start, self.numbers.start)
        last = min(numbers.stop, self.numbers.stop) - 1
        return self.sample_range(last)[1] - self.sample_range(first)[0] if first <= last else 0

    def row_range(self, shard: int) -> tuple[int, int]:
        """Return the first row of the input that the shard needs, and one past its last."""
        first, stop = self.sample_range(shard)
        if self.place.listed:
            rows = self.listed.rows[first:stop]
            return int(rows[0]), int(rows[-1]) + 1
        start, each = self.place.first_row, self.spec.variants
        return start + first // each, start - (-stop // each)

    def sample_at(self, row: int, variant: int) -> int | None:
        """Return the number of a row's sample in this part; None if the part does not have it."""
        if self.place.listed:
            return self.listed.places.get((row, variant))
        row, variant = row - self.place.first_row, variant - self.place.first_variant
        is_here = 0 <= row < self.rows and 0 <= variant < self.spec.variants
        return row * self.spec.variants + variant if is_here else None

    @property
    def listed(self) -> Listing:
        """The samples that it lists."""
        assert self.listing is not None
        return self.listing

    def without_files(self) -> Plan:
        """Return the plan without its list of files, for actors; the fingerprints stay the same.

        Actors read no files, and the list can be long. Listed samples come with the rows.
        """
        frozen = self.frozen or Frozen(self.fingerprints)
        return replace(self, files=(), frozen=frozen, listing=None)

    def locate(self, row: int) -> tuple[SourceFile, int]:
        """Return the file of a row of the input, and the row's number in it."""
        index = bisect.bisect_right(self._first_rows, row) - 1
        return self.files[index], row - self._first_rows[index]

    @cached_property
    def _first_rows(self) -> list[int]:
        """The row number in the dataset of each file's first row."""
        return list(itertools.accumulate((file.rows for file in self.files), initial=0))

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": VERSION,
                "batchgen_version": __version__,
                "spec_fingerprint": self.fingerprints.spec,
                "input_fingerprint": self.fingerprints.input,
                "plan_fingerprint": self.fingerprints.plan,
                "rows": self.rows,
                "variants": self.spec.variants,
                "samples": self.samples,
                "samples_per_shard": self.spec.output.samples_per_shard,
                "shards": self.shards,
                **({} if self.place == FIRST else {"place": asdict(self.place)}),
                "batch_size": self.spec.resources.micro_batch,
                "model": asdict(self.model),
                "columns": [list(column) for column in self.columns],
                "files": [asdict(file) for file in self.files],
                "spec": self.spec.model_dump(mode="json"),
            },
            indent=1,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the spec, the input and the weights; every marker of the plan holds it."""
        return self.fingerprints.plan

    @cached_property
    def fingerprints(self) -> Fingerprints:
        if self.frozen is not None:
            return self.frozen.fingerprints
        spec, files = self.spec.fingerprint, [asdict(file) for file in self.files]
        source = input_fingerprint(files, self.columns)
        return Fingerprints(spec, source, plan_fingerprint(spec, source, self.model, self.place))


def input_fingerprint(files: object, columns: object) -> str:
    """Hash (SHA-256) path, size, etag or mtime, row groups and schema of every file, as JSON."""
    return hashlib.sha256(canonical_json([files, columns]).encode()).hexdigest()


def plan_fingerprint(spec: str, source: str, model: ModelInfo, place: Place = FIRST) -> str:
    """Hash (SHA-256) the fingerprints of spec, input and weights, and the part's place."""
    facts: list[object] = [spec, source, model.manifest_sha256, model.revision]
    facts += [] if place == FIRST else [asdict(place)]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def make_plan(
    spec: Spec,
    model: ModelInfo,
    device: DeviceInfo | None = None,
    check_keys: bool = True,
    place: Place = FIRST,
) -> Plan:
    """Make the plan from footers. Only the key column is read as data, to check that it is unique.

    Fields that are ``auto`` get the values that fit ``device``; None means the CPU. Without
    ``check_keys``, for an output that is planned already, settings that have no effect on this
    model are allowed as well: earlier versions accepted them.

    Raises:
        InputError: no file, not Parquet, schemas that differ, a missing or ill-typed column, an
            empty dataset, a duplicate key.
    """
    if spec.output.signed:
        because = "a run does not sign; remove it, and sign a copy: `batchgen export --sign`"
        raise SpecError("output.signed", True, "", because=because)
    footers = _counted(spec.input.count) if spec.input.count else _footers(spec)
    footers = [(replace(file, name=source_name(file.name, place)), one) for file, one in footers]
    schema = footers[0][1]
    spec = with_split_column(spec, schema, footers[0][0].path)
    check_columns(spec, schema, footers[0][0].path)
    spec = check_labels(spec, schema, footers[0][0].path)
    check_fit(spec, model)
    check_approximations(spec, model)
    if check_keys:
        refuse_idle_settings(spec, model)
    for file, other in footers[1:]:
        _same_schema(schema, other, footers[0][0].path, file.path)
    if not spec.input.columns.key:
        _refuse_equal_keys([file for file, _ in footers])
    rows = sum(file.rows for file, _ in footers)
    if rows == 0:
        raise InputError(f"input {spec.input.path}: the dataset has no rows")
    spec = chosen(settle(spec, model), device or DeviceInfo())
    columns = tuple((field.name, str(field.type)) for field in schema)
    plan = Plan(
        spec=spec,
        model=model,
        files=tuple(file for file, _ in footers),
        columns=columns,
        rows=place.listed or max(0, min(rows, spec.input.limit or rows) - place.first_row),
        place=place,
        device=device,
        notes=tuple(label_notes(spec, columns)),
    )
    if check_keys and spec.input.check_keys and spec.input.columns.key:
        refuse_duplicate_keys(plan)
    if check_keys:
        plan = replace(plan, notes=(*plan.notes, *split_notes(plan)))
    return plan


def _footers(spec: Spec) -> list[tuple[SourceFile, pa.Schema]]:
    base, stats = find_files(spec.input.path)
    if is_within(spec.output.url, spec.input.path):
        raise InputError(
            f"output {spec.output.url} is inside the input {spec.input.path}, so its images would "
            "be read as input; choose an output outside the input folder"
        )
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(lambda stat: _footer(stat, base, spec.input.path), stats))


def _counted(count: int) -> list[tuple[SourceFile, pa.Schema]]:
    """Rows that have only a number (``input.count``), as if they were in a file without a path."""
    whole, rest = divmod(count, COUNTED_GROUP)
    groups = (COUNTED_GROUP,) * whole + ((rest,) if rest else ())
    return [(SourceFile("", "row", 0, "", groups), pa.schema([(COUNTED_COLUMN, pa.int64())]))]


def _footer(stat: Stat, base: str, url: str) -> tuple[SourceFile, pa.Schema]:
    try:
        with open_input(stat.path, url, stat.etag) as file:
            metadata = pq.read_metadata(file)
            told = {name: (metadata.metadata or {}).get(name, b"") for name in _TOLD}
            schema = metadata.schema.to_arrow_schema().with_metadata(told)
    except FileNotFoundError as error:
        raise InputError(f"input file {stat.path} was removed while planning") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"input file {stat.path} is not a complete Parquet file ({stat.size} bytes): {error}"
        ) from error
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    name = posixpath.relpath(stat.path, base) if base else stat.path
    return SourceFile(stat.path, name, stat.size, stat.etag, groups), schema


def _same_schema(schema: pa.Schema, other: pa.Schema, path: str, other_path: str) -> None:
    for name in dict.fromkeys([*schema.names, *other.names]):
        kinds = [
            str(one.field(name).type) if name in one.names else "missing" for one in (schema, other)
        ]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"input files differ in column {name!r}: {kinds[0]} in {path}, "
                f"{kinds[1]} in {other_path}; all files of a dataset need the same columns"
            )


def _refuse_equal_keys(files: list[SourceFile]) -> None:
    """Refuse two files whose rows would get the same keys, such as ``a`` and ``a.parquet``."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(row_key(file.name, 0), file.path)
        if other != file.path:
            raise InputError(
                f"the rows of input files {other} and {file.path} would get the same keys; rename "
                "one of the files"
            )
