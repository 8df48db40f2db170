"""Sections of the dataset card about what the images are worth: choices, scores, and limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from batchgen.output.ledger import Ledger
from batchgen.output.ranges import Ranges
from batchgen.output.tally import Tally
from batchgen.plan.plan import Plan
from batchgen.stages.scorers.filters import FILTERS
from batchgen.storage.cache import is_url

SELECTIONS = "_batchgen/selections"
EVALUATIONS = "_batchgen/evaluations"
SCORES, MEMORISED = "_batchgen/scores", "is_memorised"
MOST = 50  # records of a kind on the card
_HEAD_BYTES = 1 << 16
Rows = list[tuple[object, ...]]


def licences(plan: Plan) -> Rows:
    """The licence of the images as the user gave it, and that of the model as its card has it."""
    return [
        ("licence of the images, as given", plan.spec.output.license),
        ("licence of the model, as its card says", model_licence(plan.model.path)),
    ]


def model_licence(path: str) -> str:
    """The field ``license`` of the model's README.md; ``not stated`` if there is none here."""
    place = Path(path)
    card = (place if place.is_dir() else place.parent) / "README.md"
    if is_url(path) or not card.is_file():
        return "not stated"
    text = card.read_bytes()[:_HEAD_BYTES].decode(errors="replace")
    head = text.split("---\n")[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    try:
        told = yaml.safe_load(head)
    except yaml.YAMLError:
        return "not stated"
    given = told.get("license") if isinstance(told, dict) else None
    return str(given) if given else "not stated"


def varying(ranges: Ranges) -> Rows:
    """The columns whose values differ, with the lowest and the highest."""
    return [
        (name, f"{low:g}", f"{high:g}")
        for name, (low, high) in sorted(ranges.items())
        if low < high
    ]


def filters(plan: Plan) -> Rows:
    """The filters that could reject an image, by the fields of the policy that are set."""
    return [
        (one.reason, f"policy.{one.policy}: {_text(getattr(plan.spec.policy, one.policy))}")
        for one in FILTERS
        if getattr(plan.spec.policy, one.policy, None) not in (None, False, "off")
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def scorers(plan: Plan) -> Rows:
    """The scorers of the spec: name, model, and the beginning of its fingerprint."""
    found: Rows = []
    for one in getattr(plan.spec, "score", ()):
        settled = getattr(one, "settled", None)
        found.append((one.scorer, one.model or "", settled.fingerprint[:12] if settled else ""))
    return found


def selections(ledger: Ledger) -> Rows:
    """Name, condition, and counts of each selection of the output."""
    found: Rows = []
    for told in _records(ledger, SELECTIONS):
        given = told.get("query")
        query: Mapping[str, Any] = given if isinstance(given, dict) else {}
        asked = [query.get("where") or ""]
        if query.get("top") is not None:
            per = ", ".join(query.get("per") or ()) or "all"
            asked.append(f"top {query['top']} by {query.get('by')} of {per}")
        shown = "; ".join(str(one) for one in asked if one)
        found.append((told.get("name", ""), shown, told.get("samples"), told.get("selected")))
    return found


def evaluations(ledger: Ledger) -> Rows:
    """Name and verdict of each evaluation of the output that measured a benefit."""
    return [
        (told.get("name", ""), told["verdict"])
        for told in _records(ledger, EVALUATIONS)
        if told.get("verdict")
    ]


def _records(ledger: Ledger, folder: str) -> Iterator[Mapping[str, Any]]:
    """The JSON files of a folder that are mappings."""
    names = sorted(name for name in ledger.store.list(folder) if name.endswith(".json"))
    for name in names[:MOST]:
        try:
            told = json.loads(ledger.store.read(f"{folder}/{name}"))
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(told, dict):
            yield told


def limits(plan: Plan, tally: Tally, ledger: Ledger) -> Iterator[str]:
    """What a user of the images must know, from the plan and the records."""
    yield (
        "A model made the images. They may show things, and leave out things, in ways that its "
        "training data did, and that real photographs do not."
    )
    if plan.spec.input.columns.label is not None:
        yield ("Labels are what was asked for, and not what a person saw in the images.")
    if plan.spec.input.columns.objects is not None:
        yield "Boxes and masks are those of the source images; the model may have moved objects."
    if tally.truncated:
        yield f"{tally.truncated:,} prompts were too long for the text encoder and were cut."
    if plan.spec.sampling.approximate.names:
        yield "Sampling was approximate, so the images are not those of the exact method."
    if tally.rejected:
        yield (
            f"{tally.rejected:,} samples were rejected, so classes and prompts may have fewer "
            "images than planned."
        )
    if not evaluations(ledger):
        yield "It was not measured whether the images help a classifier (`batchgen eval`)."
    if not _is_compared(ledger):
        yield (
            "It was not measured whether the images copy images of the model's training data "
            "(`batchgen copies --training`)."
        )


def _is_compared(ledger: Ledger) -> bool:
    """Whether a score set says which samples are copies of training images."""
    for name in ledger.store.find(SCORES):
        if name.endswith("/scores.json"):
            try:
                told = json.loads(ledger.store.read(f"{SCORES}/{name}"))
            except (FileNotFoundError, ValueError):
                continue
            columns = told.get("columns") if isinstance(told, dict) else None
            if any(isinstance(one, dict) and one.get("name") == MEMORISED for one in columns or ()):
                return True
    return False
