"""Evaluates a synthetic set: reads the sets, checks them, measures, and stores the result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchgen import __version__
from batchgen.curate.evaluate.benefit import Bench, measure, moved_images
from batchgen.curate.evaluate.checks import Sets, check
from batchgen.curate.evaluate.comparison import Benefit, compare
from batchgen.curate.evaluate.features import features_of
from batchgen.curate.evaluate.protocol import Protocol
from batchgen.curate.evaluate.quality import Measured, Quality, quality
from batchgen.curate.evaluate.sets import ImageSet, find_set, load_set
from batchgen.curate.selection import NAME
from batchgen.errors import InputError, SpecError
from batchgen.models.extractors import DEFAULT, Extractor, load_extractor
from batchgen.report import refresh_card
from batchgen.report.evaluation import page_of, text_of
from batchgen.spec.splits import TEST, TRAIN, VALIDATION
from batchgen.storage import Store, absolute, open_store

Array = np.ndarray[Any, Any]
Tell = Callable[[str, int, int], None]
FOLDER = "_batchgen/evaluations"
VERSION = 1


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        real, synthetic: places of the sets; ``OUT:NAME`` is a selection of an output.
        held_out: test images, which nothing else reads; without them only distributions are
            compared, unless the real set has a split for them.
        validation: for the choice of hyper-parameters.
        pool: all real images there are, for the ceiling.
        features: the extractor, as `load_extractor` reads it.
        revision: of the extractor on the Hub.
        protocol: of the measured benefit.
        name: of the result.
        save: folder of the result; default: in the synthetic output.
    """

    real: str
    synthetic: str
    held_out: str | None = None
    validation: str | None = None
    pool: str | None = None
    features: str = DEFAULT
    revision: str | None = None
    protocol: Protocol = field(default_factory=Protocol)
    name: str = "evaluation"
    save: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result, as it is stored.

    Attributes:
        facts: everything, as JSON values.
        text: a page in Markdown.
        files: where it is stored.
    """

    facts: dict[str, Any]
    text: str
    files: tuple[str, ...]


def evaluate(request: Request, tell: Tell, say: Callable[[str], None]) -> Evaluation:
    """Evaluate a synthetic set, and store the result as JSON, Markdown and HTML.

    Args:
        tell: called with what is done, the number done and the number in all.
        say: shows a line before work starts: the primary endpoint first.

    Raises:
        SpecError, InputError, ModelError: before anything is computed.
    """
    request.protocol.check()
    if not NAME.fullmatch(request.name):
        raise SpecError("--name", request.name, "letters, digits, _ and -")
    with ExitStack() as held:
        sets = _sets(request, held)
        store, folder = _target(request, sets)
        notes = [*sets.notes, *check(sets, request.protocol)]
        if sets.held_out is not None:
            say(request.protocol.sentence)
        extractor = load_extractor(request.features, request.revision)
        features = _features(sets, request.protocol, extractor, store, tell)
        found = quality(_measured(sets, features, extractor, request.protocol.seed))
        benefit, chosen = _benefit(sets, request.protocol, features, extractor, tell)
        facts = _facts(request, sets, found, benefit, chosen, notes)
    made = _stored(facts, request.name, store, folder)
    ledger = sets.synthetic.origin.ledger
    if request.save is None and ledger is not None:
        refresh_card(ledger)
    return made


def _sets(request: Request, held: ExitStack) -> Sets:
    """Read all sets, and take of each the splits that it is for.

    What is learnt from is of ``train``. Held-out and validation images are those of their split, if
    the set has some, and else all. Those that were not given are the splits of the real set.
    """
    side, notes = request.protocol.side, list[str]()

    def read(name: str, place: str) -> ImageSet:
        found = load_set(name, find_set(place, held), side)
        notes.extend(found.origin.notes)
        return found

    def train(whole: ImageSet) -> ImageSet:
        found = whole.of_split(TRAIN, whole.name)
        if found is None:
            raise InputError(
                f"{whole.name} set {whole.place}: all of its images are of test or validation"
            )
        notes.extend(_parted(whole, found))
        return found

    def kept(name: str, place: str | None, split: str) -> ImageSet | None:
        if place is None:
            return whole.of_split(split, name)
        given = read(name, place)
        found = given.of_split(split, name) or given
        notes.extend(_parted(given, found))
        return found

    whole = read("real", request.real)
    held_out = kept("held-out", request.held_out, TEST)
    validation = kept("validation", request.validation, VALIDATION)
    pool = None if request.pool is None else train(read("pool", request.pool))
    real, synthetic = train(whole), train(read("synthetic", request.synthetic))
    return Sets(real, synthetic, held_out, validation, pool, tuple(dict.fromkeys(notes)))


def _parted(whole: ImageSet, found: ImageSet) -> list[str]:
    """Says which splits of a set are used, if not all of it is."""
    if len(found) == len(whole):
        return []
    used = ", ".join(sorted({one or "none" for one in found.splits}))
    return [
        f"Of the {whole.name} set {whole.place}, {len(found):,} of {len(whole):,} images are used: "
        f"those of split {used}."
    ]


def _target(request: Request, sets: Sets) -> tuple[Store, str]:
    """The store and the folder of the result."""
    if request.save is not None:
        return open_store(request.save if "://" in request.save else absolute(request.save)), ""
    ledger = sets.synthetic.origin.ledger
    if ledger is None:
        raise SpecError(
            "--save", None, "a folder for the result, since SYNTHETIC is not an output of batchgen"
        )
    return ledger.store, f"{FOLDER}/"


def _features(
    sets: Sets, protocol: Protocol, extractor: Extractor, store: Store, tell: Tell
) -> dict[str, Array]:
    """Features of the sets that need them, by name."""
    linear = sets.held_out is not None and "logistic" in protocol.classifiers
    wanted = list(sets.all()) if linear else [sets.real, sets.synthetic]
    found = {}
    for one in wanted:
        found[one.name] = features_of(
            one,
            extractor,
            store,
            lambda done, one=one: tell(f"features, {one.name}", done, len(one)),  # type: ignore[misc]
        )
    if linear:
        copies = []
        bench = Bench(sets, protocol, {})
        for number, images in enumerate(moved_images(bench)):
            tell("features, moved copies", number, len(sets.real))
            copies.append(extractor(images))
        found["moved"] = np.concatenate(copies)
    return found


def _measured(sets: Sets, features: dict[str, Array], extractor: Extractor, seed: int) -> Measured:
    real, synthetic = features["real"], features["synthetic"]
    named = extractor.name, extractor.fingerprint
    return Measured(sets.real, sets.synthetic, real, synthetic, *named, seed)


def _benefit(
    sets: Sets, protocol: Protocol, features: dict[str, Array], extractor: Extractor, tell: Tell
) -> tuple[Benefit | None, dict[str, dict[str, float]]]:
    if sets.held_out is None:
        return None, {}
    trained, chosen = measure(Bench(sets, protocol, features), tell)
    pool = None if sets.pool is None else len(sets.pool) / len(sets.classes)
    return compare(trained, protocol, pool), chosen


def _facts(
    request: Request,
    sets: Sets,
    found: Quality,
    benefit: Benefit | None,
    chosen: dict[str, dict[str, float]],
    notes: list[str],
) -> dict[str, Any]:
    protocol = request.protocol
    facts = {
        "version": VERSION,
        "batchgen": __version__,
        "name": request.name,
        "primary_endpoint": protocol.sentence if benefit else None,
        "verdict": benefit.verdict if benefit else None,
        "helps": benefit.helps if benefit else None,
        "sets": {
            one.name: {
                "place": one.place,
                "images": len(one),
                "fingerprint": one.fingerprint,
                "classes": one.counts(),
            }
            for one in sets.all()
        },
        "quality": found.facts(),
        "protocol": protocol.facts() if benefit else None,
        "hyper_parameters": chosen,
        "benefit": benefit.facts() if benefit else None,
        "notes": [*notes, *_notes(sets, protocol, benefit)],
    }
    plain: dict[str, Any] = json.loads(json.dumps(_finite(facts)))
    return plain


def _notes(sets: Sets, protocol: Protocol, benefit: Benefit | None) -> list[str]:
    """What a reader must know about the figures."""
    found = [
        "Fréchet distance, KID and Vendi score depend on the extractor and on the number of "
        "images; compare only figures of the same extractor and numbers."
    ]
    if benefit is None:
        return [*found, "The benefit was not measured: there is no held-out set (--held-out)."]
    saw = protocol.generator_saw
    found.append(
        f"The generator was trained on: {saw}."
        if saw
        else "What the generator was trained on is not stated (--generator-saw). If it saw more "
        "labelled images than the classifier, a gain is transfer from them, not free information."
    )
    least = min(sets.real.counts().values())
    for count in protocol.per_class:
        if count == least:
            found.append(
                f"With {count} per class every draw has all images of the smallest class, so its "
                "differences are mostly those of the classifier's seed."
            )
        elif 10 * count > least:
            found.append(
                f"With {count} per class the draws share images, since the smallest class has "
                f"{least:,}: they depend on each other, so intervals are too narrow and p-values "
                "too low for other real images."
            )
    if any(plan.spec.image_parts for plan in sets.synthetic.origin.parts):
        found.append(
            "The synthetic images were made from images. Where an arm has fewer real images than "
            "these, it still learns from what was made of the others."
        )
    if sets.validation is None:
        found.append("There is no validation set, so the usual hyper-parameters were used.")
    found.append(
        f"Intervals are over {protocol.draws} draws, for these {len(sets.held_out or ())} held-out "
        "images and this synthetic set; another generator seed is another set."
    )
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _stored(facts: dict[str, Any], name: str, store: Store, folder: str) -> Evaluation:
    text = text_of(facts)
    data = {
        "json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
        "md": text,
        "html": page_of(facts),
    }
    for ending, content in data.items():
        store.put(f"{folder}{name}.{ending}", content.encode())
    files = tuple(f"{store.url}/{folder}{name}.{ending}" for ending in data)
    return Evaluation(facts, text, files)
