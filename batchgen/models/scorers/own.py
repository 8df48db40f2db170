"""A user's own scorers: named by ``module:function``, or by an entry point of an installed package.

The module is imported as Python imports any: it is installed, or its folder is in PYTHONPATH, on
every machine of the cluster.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from batchgen.errors import BatchgenError, ModelError, SpecError
from batchgen.models.scorers.kind import Job, Kind, settled
from batchgen.spec.score_section import ENTRY_POINTS, ScorerSpec
from batchgen.stages.scorers.call import figures_of
from batchgen.stages.scorers.filters import READ
from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import Scorer

_PARTS = ("columns", "reads", "compares", "fingerprint")


def _settle(spec: ScorerSpec, job: Job) -> ScorerSpec:
    scorer = _made(spec, "cpu")
    job.refuse_missing(spec, scorer.reads, scorer.compares)
    reserved = {*READ, *(one.name for one in PixelStatistics.columns)}
    for name in (*(one.name for one in scorer.columns), *figures_of(scorer)):
        if name.lower() in reserved:
            because = (
                f"it fills {name}, by which batchgen rejects or marks images; give the column "
                "another name"
            )
            raise SpecError("score.scorer", spec.scorer, "", because=because)
    try:
        return settled(spec, scorer)
    except ValueError as error:
        raise ModelError(f"scorer {spec.title}: one of its columns has {error}") from error


OWN = Kind(_settle, lambda spec, device: _made(spec, device))


def _entry(spec: ScorerSpec) -> EntryPoint:
    if spec.is_own:
        return EntryPoint("scorer", spec.scorer, ENTRY_POINTS)
    found = [one for one in entry_points(group=ENTRY_POINTS) if one.name == spec.scorer]
    if not found:
        raise ModelError(
            f"scorer {spec.scorer}: no installed package has an entry point of that name in the "
            f"group {ENTRY_POINTS}; install its package on this machine"
        )
    return found[0]


def _made(spec: ScorerSpec, device: str) -> Scorer:
    """The scorer itself: what was named, or what it returns."""
    entry = _entry(spec)
    try:
        named = entry.load()
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ModelError(
            f"scorer {spec.title}: {entry.value} cannot be imported "
            f"({type(error).__name__}: {error}); needed: a module that is installed or in "
            "PYTHONPATH, and a function or class in it"
        ) from error
    is_ready = not isinstance(named, type) and all(hasattr(named, part) for part in _PARTS)
    if is_ready and (spec.model is not None or spec.revision is not None):
        because = f"{spec.scorer} reads no model; remove it"
        raise SpecError("score.model", spec.model or spec.revision, "null", because=because)
    made = named if is_ready and not spec.options else _called(spec, named, device)
    missing = [part for part in _PARTS if not hasattr(made, part)]
    if missing or not callable(made):
        raise ModelError(
            f"scorer {spec.title}: got {type(made).__name__} without {', '.join(missing) or 'call'}"
            "; needed: a function with the decorator batchgen.stages.scorers.scorer.scores, or one "
            "that returns such a scorer"
        )
    scorer: Scorer = made
    return scorer


def _called(spec: ScorerSpec, named: Any, device: str) -> Any:
    """Call the function or class with its options and, if it has such parameters, its model."""
    try:
        known = inspect.signature(named).parameters
        ours = {"model": spec.model, "device": device, "batch_size": spec.batch_size}
        ours |= {} if spec.revision is None else {"revision": spec.revision}
        for name in ("model", "revision"):
            if getattr(spec, name) is not None and name not in known:
                raise ModelError(f"scorer {spec.title}: {spec.scorer} has no parameter {name!r}")
        return named(**{name: ours[name] for name in ours if name in known}, **spec.options)
    except BatchgenError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ModelError(
            f"scorer {spec.title}: it cannot be made with the options "
            f"{', '.join(spec.options) or 'none'} ({type(error).__name__}: {error})"
        ) from error
