"""What `score` was asked for: its scorers, checked against the output, and their set's record."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from batchgen.curate.columns import IMAGES, columns_of
from batchgen.curate.score_sets import shards_of
from batchgen.errors import InputError, NewerFormat, SpecError
from batchgen.models.scorers import check_scorers
from batchgen.output.find import contents
from batchgen.output.formats import format_of
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import (
    SET_NAME,
    ScoreSet,
    SetColumn,
    read_set,
    refuse_other,
    require_set,
    set_names,
    shown_scorers,
)
from batchgen.plan.plan import Plan
from batchgen.plan.scores import MOST_LABELS, too_many_labels
from batchgen.shard.rescore import COMPARED
from batchgen.spec.score_section import OPTIONS, ScorerSpec
from batchgen.spec.sections import Pool


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        specs: the scorers; none: those of the set.
        name: of the set; None: made of the scorers' names.
        shards: limits the run to these ("A:B" means A to B-1).
        pool: the replicas and what each of them reserves.
    """

    specs: tuple[ScorerSpec, ...] = ()
    name: str | None = None
    shards: str | None = None
    pool: Pool = field(default_factory=Pool)


def pool_of(num_gpus: float | None, num_cpus: float | None, max_replicas: int | None) -> Pool:
    """The pool with these resources.

    Raises:
        SpecError: one of them is not allowed; names its flag.
    """
    given = {"num_gpus": num_gpus, "num_cpus": num_cpus, "max_replicas": max_replicas}
    try:
        return Pool.model_validate({name: one for name, one in given.items() if one is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]) if fault["loc"] else "max_replicas"
        raise SpecError(f"--{name.replace('_', '-')}", given[name], fault["msg"]) from None


def settled(
    ledger: Ledger, asked: Request, parts: Sequence[Plan]
) -> tuple[ScoreSet, tuple[ScorerSpec, ...]]:
    """The record of the set, and its scorers as they were checked against the output.

    Raises:
        SpecError: a wrong name, or no scorer.
        InputError: no committed shard, or no such set to continue.
        PlanChanged: the set has other scorers, or scores of another output.
    """
    name = asked.name or _name_of(ledger, asked.specs)
    if not SET_NAME.fullmatch(name):
        raise SpecError("--name", name, "letters, digits, _ and -")
    found = read_set(ledger, name)
    if found is None and not asked.specs:
        require_set(ledger, name)
    if found is not None and not found.scorers:
        raise InputError(
            f"score set {name!r} of {ledger.store.url} was stored by another command; choose "
            "another --name"
        )
    specs = _checked(ledger, parts, _kept(asked.specs, found))
    record = ScoreSet(
        name=name,
        scorers=tuple(spec.model_dump(mode="json") for spec in specs),
        columns=tuple(
            SetColumn(column, kind, spec.settled.about.get(column, ""))
            for spec in specs
            if spec.settled is not None
            for column, kind in spec.settled.columns.items()
        ),
        fingerprint=fingerprint_of(specs),
        plans=tuple(plan.fingerprint for plan in parts),
        made_at=time.time(),
    )
    if found is not None:
        refuse_other(ledger, found, record)
    return record, specs


def fingerprint_of(specs: Sequence[ScorerSpec]) -> str:
    """Of the scorers with their models and settings, and their columns.

    A user's own scorer may leave out its model and its options of its fingerprint.
    """
    facts = [
        [spec.scorer, spec.settled.fingerprint, spec.settled.columns, *_given(spec)]
        for spec in specs
        if spec.settled is not None
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _given(spec: ScorerSpec) -> list[Any]:
    """What a user's own scorer is made with; empty for the others, whose fingerprint has it all."""
    if spec.scorer in OPTIONS:
        return []
    return [spec.model, spec.revision, spec.batch_size, spec.options]


def _name_of(ledger: Ledger, specs: Sequence[ScorerSpec]) -> str:
    """A name for the set: its scorers'; without them, the only set of the output."""
    if specs:
        whole = "-".join(re.sub(r"[^A-Za-z0-9_-]+", "-", one.scorer) for one in specs)
        return whole.lstrip("-_")[:100]
    names = set_names(ledger)
    if len(names) == 1:
        return names[0]
    known = f"--name with one of {', '.join(names)}" if names else "there is no score set yet"
    raise SpecError("--scorer", None, f"the name of a scorer, such as phash ({known})")


def _kept(specs: tuple[ScorerSpec, ...], found: ScoreSet | None) -> tuple[ScorerSpec, ...]:
    """The scorers as the set has them, if they are the same: those of a hub keep their commit."""
    if found is None:
        return specs
    saved = _saved(found)
    if not specs:
        return saved
    if len(specs) != len(saved):
        return specs
    pairs = zip(specs, saved, strict=True)
    return tuple(was if one.asks_for(was) else one for one, was in pairs)


def _saved(found: ScoreSet) -> tuple[ScorerSpec, ...]:
    """The scorers of a set, as its record has them.

    Raises:
        NewerFormat: this version does not know them.
    """
    try:
        read = partial(ScorerSpec.model_validate, extra="ignore")
        return tuple(read(one) for one in found.scorers)
    except ValidationError as error:
        raise NewerFormat(
            f"score set {found.name!r} was made by another batchgen, with scorers or options that "
            f"this version does not know ({shown_scorers(found)}): use that version, or score "
            "again under another --name"
        ) from error


def _checked(
    ledger: Ledger, parts: Sequence[Plan], specs: tuple[ScorerSpec, ...]
) -> tuple[ScorerSpec, ...]:
    """Check the scorers against the output; InputError if nothing is committed yet."""
    first = next(shards_of(ledger), None)
    if first is None:
        raise InputError(f"{ledger.store.url} has no committed shard yet, so nothing to score")
    plan, marker = first
    whole = format_of(plan).schema(dict(contents(ledger, marker)))
    schema = pa.schema([one for one in whole if one.name not in IMAGES], whole.metadata)

    def values(name: str) -> Collection[Any]:
        quoted = '"' + name.replace('"', '""') + '"'
        if name == "objects":  # a struct of lists
            quoted = 'unnest("objects"."category")'
        table = columns_of(ledger).query(
            f"select distinct {quoted} as one from samples limit {MOST_LABELS + 2}"
        )
        if table.num_rows > MOST_LABELS + 1:  # null is one
            raise too_many_labels(name)
        return set(table.column("one").to_pylist()) - {None}

    has_sources = any(part in COMPARED for one in parts for part in one.spec.image_parts)
    known = plan.model.class_names
    names = {"class_label": known if any(known) else ()}
    return check_scorers(specs, schema, values, has_sources, plan.spec.labels.names or (), names)
