"""Tries what a job will need, before it needs it: the input, the model, and the output's store."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batchgen.errors import BatchgenError
from batchgen.plan import make_plan
from batchgen.replicas import inspect
from batchgen.spec import Spec
from batchgen.storage import Store, open_store
from batchgen.storage.store import PROBES


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ``grade`` is ``ok``, ``warning`` or ``failed``."""

    name: str
    grade: str
    message: str


def examine(spec: Spec) -> Iterator[Check]:
    """Try everything, each as it comes; stores are reached as the spec says.

    In the output it writes one small object, reads, lists and removes it.
    """
    yield _tried("input and model", lambda: _planned(spec))
    store = open_store(spec.output.url)
    written = _tried("output: write, read, list, delete", lambda: _used(store))
    yield written
    if written.grade == "ok":
        yield _tried("output: create-only writes", lambda: _exclusive(store))


def _tried(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    try:
        return Check(name, *check())
    except (BatchgenError, FileNotFoundError) as error:
        return Check(name, "failed", str(error))


def _planned(spec: Spec) -> tuple[str, str]:
    plan = make_plan(spec, inspect(spec.model, spec.task))
    return "ok", f"{plan.rows} rows, {plan.samples} samples, {plan.model.model_id}"


def _used(store: Store) -> tuple[str, str]:
    name = f"{PROBES}/{uuid.uuid4().hex}"
    body = b"batchgen doctor"
    store.put(name, body)
    try:
        if store.read(name) != body:
            return "failed", f"{store.url}: what was written is read back as something else"
        if name.rpartition("/")[2] not in store.list(PROBES):
            return "failed", f"{store.url}: what was written is not listed at once"
    finally:
        store.delete(name)
    return "ok", store.url


def _exclusive(store: Store) -> tuple[str, str]:
    if store.creates_alone():
        return "ok", "of two writers of one name the second is refused"
    return "warning", (
        "this store lets a second writer overwrite a name that it should only create; runs that "
        "start at the same moment are told apart after a pause of some seconds instead"
    )
