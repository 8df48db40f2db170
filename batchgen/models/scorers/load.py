"""Checks scorers before work starts, and loads them once for each process and device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from batchgen.errors import ModelError, SpecError
from batchgen.models.libraries import prepare
from batchgen.models.scorers.kind import Job, Kind, weightless
from batchgen.models.scorers.models import MODEL_KINDS
from batchgen.models.scorers.own import OWN
from batchgen.spec.score_section import MODELS, ScorerSpec
from batchgen.stages.scorers.phash import PerceptualHash
from batchgen.stages.scorers.quality import Quality
from batchgen.stages.scorers.scorer import Scorer

KINDS: dict[str, Kind] = {
    "phash": weightless(lambda spec: PerceptualHash()),
    "quality": weightless(lambda spec: Quality(**spec.read_options().model_dump())),
    **MODEL_KINDS,
}
_LOADED: dict[tuple[str, str], Scorer] = {}
_LOADING = threading.Lock()


def check_scorers(
    specs: Sequence[ScorerSpec],
    schema: pa.Schema,
    values: Callable[[str], Collection[Any]] = lambda name: (),
    has_sources: bool = False,
    categories: Sequence[str] = (),
    class_names: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[ScorerSpec, ...]:
    """Check scorers before work starts, without loading weights.

    Args:
        specs: as the user gave them, or as they were settled before.
        schema: the columns of the output that the scorers may read, with its metadata.
        values: returns the different values of a column, such as ``label``, without null, and of
            ``objects`` the categories; called if a scorer needs them.
        has_sources: whether the images have conditioning images to compare with.
        categories: names of the categories of objects, by number; empty if they are not known.
        class_names: column -> names of its classes by number, where the schema declares none.

    Returns:
        The same scorers, settled: each with its fingerprint and its columns, with which
        ``load_scorers`` loads it anywhere.

    Raises:
        SpecError: an option is wrong, a column is missing, or two scorers fill the same column.
        ModelError: a model cannot be found, or is of another kind than its scorer needs.
    """
    job = Job(schema, values, has_sources, categories, class_names)
    found = tuple(_kind(spec).settle(spec, job) for spec in specs)
    for before, now in zip(specs, found, strict=True):
        _refuse_other(before, now)
    _refuse_twice(found, schema)
    return found


def load_scorers(
    specs: Sequence[ScorerSpec], device: str = "cpu", threads: int = 1
) -> list[Scorer]:
    """Load scorers that ``check_scorers`` settled, with their weights, on a torch device.

    A scorer is loaded once for each process and device, whatever thread asks first. ``threads`` is
    the number of CPU threads that torch may use in this process: scores depend on it, as images do.

    Raises:
        ModelError: a model cannot be found on this machine, or is not the one that was checked.
    """
    with _LOADING:
        if any(spec.scorer in MODELS or spec.model is not None for spec in specs):
            prepare(threads)
        return [_loaded(spec, device) for spec in specs]


def _loaded(spec: ScorerSpec, device: str) -> Scorer:
    name = (spec.model_dump_json(), device)
    if name not in _LOADED:
        scorer = _kind(spec).load(spec, device)
        if spec.settled is not None and scorer.fingerprint != spec.settled.fingerprint:
            raise _changed(spec, scorer.fingerprint)
        _LOADED[name] = scorer
    return _LOADED[name]


def _kind(spec: ScorerSpec) -> Kind:
    return KINDS.get(spec.scorer, OWN)


def _refuse_other(before: ScorerSpec, now: ScorerSpec) -> None:
    """Refuse a scorer that was settled with another model or other settings."""
    assert now.settled is not None
    if before.settled is not None and before.settled.fingerprint != now.settled.fingerprint:
        raise _changed(before, now.settled.fingerprint)


def _changed(spec: ScorerSpec, found: str) -> ModelError:
    planned = spec.settled.fingerprint if spec.settled else ""
    return ModelError(
        f"scorer {spec.title} is not the one that was planned: its fingerprint was {planned!r}, "
        f"now it is {found!r}; restore its model and its version, or score into a new output"
    )


def _refuse_twice(specs: Sequence[ScorerSpec], schema: pa.Schema) -> None:
    """Refuse scorers whose columns have the name of another column."""
    names = [name.lower() for spec in specs if spec.settled for name in spec.settled.columns]
    for spec in specs:
        for name in spec.settled.columns if spec.settled else ():
            if Counter(names)[name.lower()] > 1:
                because = f"two scorers fill the column {name}; remove one of the two"
                raise SpecError("score.scorer", spec.scorer, "", because=because)
