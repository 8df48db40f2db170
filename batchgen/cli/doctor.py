"""Tests what a job needs before it runs: the input, the model, and the output's store."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from batchgen.cli.machine import Check, device, gib, gpus
from batchgen.errors import BatchgenError
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.plan.plan import Plan
from batchgen.records import Dropped
from batchgen.runner import plan_job
from batchgen.shard.prepare import prepare
from batchgen.spec.spec import Spec
from batchgen.storage import Store, open_store
from batchgen.storage.store import PROBES

FIRST_ROWS = 8
RESERVE_BYTES = 16 << 20  # for markers, logs, card, report and contact sheet
PIXEL_BYTES = {"png": 3.0, "jpeg": 1.0, "webp": 1.0}  # upper bounds, except for pure noise


def examine(spec: Spec) -> Iterator[Check]:
    """Run all checks and yield each result at once; stores are reached as the spec says.

    In the output it writes one small object, reads it, lists it and deletes it.
    """
    plans: list[Plan] = []
    yield _tried("input and model", lambda: _planned(spec, plans))
    for plan in plans:
        yield _tried("first rows", partial(_first_rows, plan))
        yield device(plan)
    yield gpus()
    for plan in plans:
        yield from _memory(plan)
    store = open_store(spec.output.url)
    written = _tried("output: write, read, list, delete", lambda: _used(store))
    yield written
    if written.grade == "ok":
        yield _tried("output: create-only writes", lambda: _exclusive(store))
    if store.local:
        for plan in plans:
            yield _tried("output: free space", partial(_room, plan, store))


def _tried(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    try:
        return Check(name, *check())
    except (BatchgenError, FileNotFoundError) as error:
        return Check(name, "failed", str(error))


def _planned(spec: Spec, plans: list[Plan]) -> tuple[str, str]:
    plan = plan_job(spec)
    plans.append(plan)
    return "ok", f"{plan.rows} rows, {plan.samples} samples, {plan.model.model_id}"


def _first_rows(plan: Plan) -> tuple[str, str]:
    """Read and prepare the first rows as a run does, with their images, settings and columns."""
    rows = min(plan.rows, FIRST_ROWS)
    output = plan.spec.output.model_copy(update={"samples_per_shard": rows * plan.spec.variants})
    few = replace(plan, spec=plan.spec.model_copy(update={"output": output}))
    (span,) = make_spans(few, [0])
    columns = read_columns(few.spec, [name for name, _ in few.columns])
    (shard,) = read_span(span, few.spec, columns)
    dropped = {one.source_id: one for one in prepare(shard, few).dropped}
    if not dropped:
        return "ok", f"{rows} of {rows} can be generated"
    said = f"{len(dropped)} of {rows} would be rejected: {_reasons(list(dropped.values()))}"
    return "failed" if len(dropped) == rows else "warning", said


def _memory(plan: Plan) -> Iterator[Check]:
    """On a machine with GPUs, compare their memory, and the host's, with the job's need."""
    from batchgen.cli.memory import needed, told
    from batchgen.cluster.driver import visible_gpus

    found = visible_gpus()
    if not found:
        return
    try:
        yield from told(plan, needed(plan), found)
    except BatchgenError as error:
        yield Check("memory", "warning", str(error))


def _reasons(dropped: list[Dropped]) -> str:
    """List each reason with its count and one example."""
    counts = Counter(one.reason for one in dropped)
    example = {one.reason: f"{one.source_id}: {one.message}" for one in reversed(dropped)}
    return "; ".join(f"{count} {name} ({example[name]})" for name, count in counts.most_common())


def _room(plan: Plan, store: Store) -> tuple[str, str]:
    """Compare the free space of a local output with an upper bound of what the images need."""
    folder = store.path("")
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    sampling, kind = plan.spec.sampling, plan.spec.output.image_format
    pixels = (sampling.width or 0) * (sampling.height or 0) * plan.samples
    most = RESERVE_BYTES + int(pixels * PIXEL_BYTES[kind])
    said = f"{gib(free)} free in {folder}; {plan.samples} images as {kind} need up to {gib(most)}"
    if free < RESERVE_BYTES:
        return "failed", f"{said}, and markers, card and report need {gib(RESERVE_BYTES)} of that"
    return "warning" if free < most else "ok", said


def _used(store: Store) -> tuple[str, str]:
    name = f"{PROBES}/{uuid.uuid4().hex}"
    body = b"batchgen doctor"
    store.put(name, body)
    try:
        if store.read(name) != body:
            return "failed", f"{store.url}: reading returns other bytes than were written"
        if name.rpartition("/")[2] not in store.list(PROBES):
            return "failed", f"{store.url}: a new object is not listed at once"
    finally:
        store.delete(name)
    return "ok", store.url


def _exclusive(store: Store) -> tuple[str, str]:
    if store.supports_create_only():
        return "ok", "if two writers create the same name, the second is refused"
    return "warning", (
        "this store ignores create-only writes: a second writer overwrites the first. Runs that "
        "start at the same moment detect each other after a pause of some seconds instead"
    )
