"""Exports a finished output as a dataset: images and labels by shard, annotation files last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow.compute as pc

from batchgen.errors import InputError, Interrupted
from batchgen.labels.columns import OBJECTS
from batchgen.labels.objects import Category as Value
from batchgen.output.datasets.classes import Classes, classes_found, classes_from
from batchgen.output.datasets.layout import Layout
from batchgen.output.datasets.records import OURS, Records, Request, ShardRecord, digest_of
from batchgen.output.datasets.sample import images_of
from batchgen.output.finished import (
    Proven,
    proven,
    refuse_nested,
    refuse_unfinished,
    refuse_unless_empty,
)
from batchgen.output.lease import LEASE_SECONDS, Lease, hold_lease
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.restrict import Chosen
from batchgen.output.verify import Provers, exporting
from batchgen.plan.parts import Parts
from batchgen.storage import Store

_THREADS = 4  # each holds one shard


@dataclass
class Totals:
    """The sums over all shards of an export.

    Attributes:
        splits: split -> [images, objects].
        left_out: reason -> number of images.
        notes: reason -> number of objects.
        written_now: number of shards that this call wrote.
    """

    splits: dict[str, list[int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    written_now: int = 0

    def add(self, record: ShardRecord) -> None:
        for split, (images, objects) in record.counts.items():
            sums = self.splits.setdefault(split, [0, 0])
            sums[0] += images
            sums[1] += objects
        self.left_out.update(record.left_out)
        self.notes.update(record.notes)

    def to_json(self) -> dict[str, Any]:
        return {
            "splits": self.splits,
            "left_out": dict(self.left_out),
            "notes": dict(self.notes),
            "written_now": self.written_now,
        }

    def text(self, with_objects: bool = True) -> str:
        """The sums as a sentence."""
        parts = [
            f"{split}: {_many(images, 'image')}"
            + (f", {_many(objects, 'object')}" if with_objects else "")
            for split, (images, objects) in sorted(self.splits.items())
        ]
        parts += [
            f"{_many(count, 'image')} left out: {reason}"
            for reason, count in sorted(self.left_out.items())
        ]
        parts += [f"{count:,} {reason}" for reason, count in sorted(self.notes.items())]
        return "; ".join(parts)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Job:
    """One export: its source and plan, its target's records, and what is written."""

    source: Ledger
    provers: Provers
    parts: Parts
    target: Store
    layout: Layout
    void: str
    settings: dict[str, Any]
    chosen: Chosen | None = None

    @property
    def records(self) -> Records:
        return Records(self.target)

    @property
    def shards(self) -> range:
        return self.parts.numbers


def export_dataset(
    source: Ledger,
    parts: Parts,
    target: Store,
    layout: Layout,
    void: str,
    settings: dict[str, Any],
    chosen: Chosen | None = None,
) -> Totals:
    """Write the finished output at ``source`` as a dataset; an interrupted export continues.

    Images keep their bytes. The files of a shard are written before its record, and annotation
    files after all records, so a file of annotations is complete if it exists.

    Args:
        source, parts: the output.
        target: an empty folder, or one with an unfinished export of the same settings.
        layout: what is written.
        void: what to do with images whose labels are void: ``skip``, ``empty`` or ``refuse``.
        settings: name and options of the layout and ``void``, as JSON.
        chosen: the samples that are written; None: all.

    Raises:
        InputError: the source is not finished, is damaged or has other labels than a run writes;
            no image is left; the target has other files, or one of the two is inside the other.
        OutputBusy, Interrupted: another process writes to the target.
    """
    refuse_unfinished(source, parts, then="export")
    refuse_nested(source, target)
    if chosen is not None:
        settings = {**settings, "selection": chosen.digest}
    job = Job(source, exporting(source, parts), parts, target, layout, void, settings, chosen)
    with hold_lease(target, lambda reason: None) as lease:
        target.clear_temporary(older_than_s=LEASE_SECONDS)
        return _export(job, lease)


def _export(job: Job, lease: Lease) -> Totals:
    records = job.records
    request = records.request()
    if request is None or not request.is_same(job.parts.fingerprint, job.settings):
        refuse_unless_empty(job.target, OURS)
        records.remove_shards()
        classes = _classes(job)
        _refuse_void(job, classes)
        request = Request(job.parts.fingerprint, job.settings, classes.to_json())
        records.keep_request(request)
    digest = digest_of(job.source.markers(job.shards))
    if request.source:
        return _complete(job, request, digest)
    classes = classes_from(request.classes)
    totals = Totals()
    for record, new in _each(partial(_shard, job, classes), job.shards, lease):
        totals.add(record)
        totals.written_now += new
    if not totals.splits and not totals.left_out:
        raise InputError(f"source {job.source.store.url} has no accepted image to export")
    if not totals.splits:
        raise InputError(
            f"source {job.source.store.url}: no image can be exported ({totals.text()}); "
            "`--void empty` exports images whose labels are void as images without objects"
        )
    splits = sorted(totals.splits)
    entries = partial(records.entries, job.shards)
    for name, data in job.layout.last(splits, entries, classes, job.parts[0]):
        job.target.put(name, data)
    records.keep_request(replace(request, source=digest, totals=totals.to_json()))
    records.remove_shards()
    return totals


def _complete(job: Job, request: Request, digest: str) -> Totals:
    """The sums of an export that is complete already."""
    if request.source != digest:
        raise InputError(
            f"target {job.target.url} holds a complete export, but shards of {job.source.store.url}"
            " were generated again since; choose an empty folder"
        )
    job.records.remove_shards()  # the last export may have ended before this
    told = request.totals or {}
    return Totals(told["splits"], Counter(told["left_out"]), Counter(told["notes"]))


def _each(
    make: Callable[[int], tuple[ShardRecord, bool]], shards: Iterable[int], lease: Lease
) -> Iterator[tuple[ShardRecord, bool]]:
    """Make several shards at a time, in order; the first error ends the export."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="export")
    try:
        for made in pool.map(make, shards):
            if lease.lost.is_set():
                raise Interrupted("another run has taken over the lease of the target")
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


def _shard(job: Job, classes: Classes, shard: int) -> tuple[ShardRecord, bool]:
    """Write the files of a shard and then its record; True if it was not there yet."""
    done = job.records.shard(shard)
    marker = job.source.marker(shard)
    if done is not None and marker is not None and done.source == digest_of([marker]):
        return replace(done, entries={}), False
    found = proven(job.provers.of(shard), shard)
    record = _write(job, classes, found)
    job.records.keep_shard(record)
    return replace(record, entries={}), True


def _write(job: Job, classes: Classes, found: Proven) -> ShardRecord:
    shard = found.marker.shard
    left_out, notes = Counter[str](), Counter[str]()
    counts: dict[str, tuple[int, int]] = {}
    entries: dict[str, list[Any]] = {}
    column, table = job.layout.column, found.table
    if job.chosen is not None:
        table, others = job.chosen.split(table)
        if others.num_rows:
            left_out.update({f"not in the selection {job.chosen.name!r}": others.num_rows})
    for image in images_of(table, job.parts.of(shard), shard, classes, column, job.void):
        if isinstance(image, str):
            left_out[image] += 1
            continue
        made = job.layout.image(image, classes)
        for name, data in made.files:
            job.target.put(name, data)
        images, objects = counts.get(image.split, (0, 0))
        counts[image.split] = (images + 1, objects + made.objects)
        notes.update(made.notes)
        if made.entry is not None:
            entries.setdefault(image.split, []).append(made.entry)
    digest = digest_of([found.marker])
    return ShardRecord(shard, digest, counts, dict(left_out), dict(notes), entries)


def _classes(job: Job) -> Classes:
    """The categories that the spec declares, else those that occur, which takes a read of all."""
    declared = job.parts.spec.labels.categories
    if declared is not None:
        classes = Classes(declared)
    elif job.parts.spec.input.columns.objects is None:
        classes = Classes(())
    else:
        found: set[Value] = set()
        for marker in _markers(job):
            found |= _values(proven(job.provers.of(marker.shard), marker.shard))
        classes = classes_found(found)
    assert classes.ids is not None  # raises if two categories share an id
    return classes


def _markers(job: Job) -> Iterator[Marker]:
    return job.source.markers(job.shards)


def _values(found: Proven) -> set[Value]:
    objects = found.table.column(OBJECTS).combine_chunks()
    categories = pc.list_flatten(pc.struct_field(objects, "category"))
    return {one for one in pc.unique(categories).to_pylist() if one is not None}


def _refuse_void(job: Job, classes: Classes) -> None:
    """With ``refuse``, look for void labels before anything is written."""
    if job.void != "refuse":
        return
    for marker in _markers(job):
        table = proven(job.provers.of(marker.shard), marker.shard).table
        if job.chosen is not None:
            table, _ = job.chosen.split(table)
        column = job.layout.column
        plan, shard = job.parts.of(marker.shard), marker.shard
        for _ in images_of(table, plan, shard, classes, column, job.void):
            pass
