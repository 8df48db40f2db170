"""The scorers that read a model: how each is checked without its weights, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError, SpecError
from batchgen.labels.columns import object_fields
from batchgen.models.image_networks import refuse_random
from batchgen.models.scorers import networks
from batchgen.models.scorers.class_map import (
    known_classes,
    named_labels,
    numbered_labels,
)
from batchgen.models.scorers.files import ScorerModel, configured_size, fingerprint, scorer_model
from batchgen.models.scorers.kind import Job, Kind, call_size, settled
from batchgen.models.scorers.nsfw import NSFW
from batchgen.models.scorers.real import real_features, reference_sha256
from batchgen.spec.score_section import ScorerSpec
from batchgen.stages.scorers.classes import ClassAgreement
from batchgen.stages.scorers.detection import ObjectsFound
from batchgen.stages.scorers.features import Embedding, RealDistance, SourceSimilarity
from batchgen.stages.scorers.scorer import Scorer
from batchgen.stages.scorers.text_match import PromptSimilarity, ZeroShot

CLIPS = ("CLIPModel", "SiglipModel", "Siglip2Model", "AltCLIPModel", "ChineseCLIPModel")
CLIP = f"a model of images and texts that transformers saved ({', '.join(CLIPS)})"
CLASSIFIER = "an image classifier that transformers saved (...ForImageClassification)"
DETECTOR = "an object detector that transformers saved (...ForObjectDetection)"
FEATURES = "an image model that transformers saved"


def _clip(spec: ScorerSpec) -> ScorerModel:
    return scorer_model(spec, CLIP, CLIPS, texts=True)


def _classifier(spec: ScorerSpec) -> ScorerModel:
    return scorer_model(spec, CLASSIFIER, ("ForImageClassification",))


def _detector(spec: ScorerSpec) -> ScorerModel:
    return scorer_model(spec, DETECTOR, ("ForObjectDetection",))


def _image_model(spec: ScorerSpec) -> ScorerModel:
    model = scorer_model(spec, FEATURES, ("",))
    try:
        refuse_random(model.config.get("model_type"), model.folder)
    except ModelError as error:
        raise ModelError(f"{model.field}: {error}") from error
    return model


def _classes(spec: ScorerSpec) -> dict[str, Any]:
    return {} if spec.settled is None else dict(spec.settled.classes)


def _kind(
    find: Callable[[ScorerSpec], ScorerModel],
    make: Callable[[ScorerSpec, ScorerModel, dict[str, Any], str | None], Scorer],
    classes: Callable[[ScorerSpec, ScorerModel, Job], dict[str, Any]] = lambda *_: {},
) -> Kind:
    """A kind of scorer that reads a model.

    Args:
        find: finds its model and checks what it is.
        make: makes the scorer on a device; without one, for its columns only.
        classes: label -> class, checked against a job.
    """

    def settle(spec: ScorerSpec, job: Job) -> ScorerSpec:
        model = find(spec)
        bare = make(spec, model, {}, None)
        job.refuse_missing(spec, bare.reads, bare.compares)
        found = classes(spec, model, job)
        scorer = make(spec, model, found, None)
        return settled(spec, scorer, classes=found, revision=model.revision)

    return Kind(settle, lambda spec, device: make(spec, find(spec), _classes(spec), device))


def _unloaded(*_: Any) -> Any:
    raise AssertionError("a scorer that was made for its columns only")


@cache
def _clip_on(folder: Path, device: str, size: int, sha256: str) -> Any:
    """Several scorers of one model share its weights."""
    return networks.clip_of(folder, device, size)


@cache
def _features_on(folder: Path, device: str, size: int, sha256: str) -> Any:
    return networks.features_of(folder, device, size)


def _pair(spec: ScorerSpec, model: ScorerModel, device: str | None) -> tuple[Any, Any]:
    if device is None:
        return _unloaded, _unloaded
    images, texts = _clip_on(model.folder, device, call_size(spec, device), model.sha256)
    return images, texts


def _features(spec: ScorerSpec, model: ScorerModel, device: str | None) -> Any:
    if device is None:
        return _unloaded
    return _features_on(model.folder, device, call_size(spec, device), model.sha256)


def _make_clip(spec: ScorerSpec, model: ScorerModel, _: Any, device: str | None) -> Scorer:
    images, texts = _pair(spec, model, device)
    return PromptSimilarity(
        images, texts, fingerprint(spec, model), reads=(spec.read_options().text,)
    )


def _make_zero_shot(
    spec: ScorerSpec, model: ScorerModel, classes: dict[str, Any], device: str | None
) -> Scorer:
    images, texts = _pair(spec, model, device)
    options = spec.read_options()
    told = fingerprint(spec, model, known=classes)
    reads = (options.label,)
    return ZeroShot(images, texts, told, classes, options.templates, reads=reads)


def _zero_shot_classes(spec: ScorerSpec, model: ScorerModel, job: Job) -> dict[str, Any]:
    options = spec.read_options()
    names = job.names(options.label)
    values = job.sorted_values(options.label)
    known = known_classes(spec, values)
    return known or dict(named_labels(spec, values, names, options.classes))


def _make_classifier(
    spec: ScorerSpec, model: ScorerModel, classes: dict[str, Any], device: str | None
) -> Scorer:
    logits: Any = _unloaded
    if device is not None:
        logits = networks.logits_of(model.folder, device, call_size(spec, device))
    told = fingerprint(spec, model, known=classes)
    return ClassAgreement(logits, model.names(), classes, told, reads=(spec.read_options().label,))


def _classifier_classes(spec: ScorerSpec, model: ScorerModel, job: Job) -> dict[str, Any]:
    options = spec.read_options()
    names = job.names(options.label)
    values = job.sorted_values(options.label)
    known = known_classes(spec, values)
    return known or dict(numbered_labels(spec, values, names, model.names(), options.classes))


def _make_detector(
    spec: ScorerSpec, model: ScorerModel, classes: dict[str, Any], device: str | None
) -> Scorer:
    options, detect = spec.read_options(), _unloaded
    if device is not None:
        detect = networks.detector_of(
            model.folder, device, call_size(spec, device), options.threshold
        )
    told = fingerprint(spec, model, known=classes)
    return ObjectsFound(detect, model.names(), classes, options.min_iou, options.mark_crowd, told)


def _detector_classes(spec: ScorerSpec, model: ScorerModel, job: Job) -> dict[str, Any]:
    """Category -> class, of those that are declared, else of those that occur."""
    options = spec.read_options()
    fields = object_fields(job.schema.field("objects").type) or {}
    if options.mark_crowd and fields and "iscrowd" not in fields:
        because = "the objects of the input have no field iscrowd; add it, or leave mark_crowd out"
        raise SpecError("score.options.mark_crowd", True, "", because=because)
    declared = job.categories
    values = [*range(len(declared))] if declared else job.sorted_values("objects")
    known = known_classes(spec, values)
    if known is not None:
        return known
    found = numbered_labels(spec, values, declared, model.names(), options.classes)
    by_name = {name: found[str(number)] for number, name in enumerate(declared)}
    return {**by_name, **found}


def _make_embedding(spec: ScorerSpec, model: ScorerModel, _: Any, device: str | None) -> Scorer:
    features = _features(spec, model, device)
    size = networks.feature_size(model.folder, model.sha256) or configured_size(model)
    return Embedding(features, size, fingerprint(spec, model))


def _make_source(spec: ScorerSpec, model: ScorerModel, _: Any, device: str | None) -> Scorer:
    return SourceSimilarity(_features(spec, model, device), fingerprint(spec, model))


def _make_real(spec: ScorerSpec, model: ScorerModel, _: Any, device: str | None) -> Scorer:
    options, features = spec.read_options(), _features(spec, model, device)
    sha256 = reference_sha256(options.reference, options.neighbours)
    told = fingerprint(spec, model, reference=sha256)
    return RealDistance(
        features, lambda: real_features(options, features), options.neighbours, told
    )


MODEL_KINDS: dict[str, Kind] = {
    "clip": _kind(_clip, _make_clip),
    "zero-shot": _kind(_clip, _make_zero_shot, _zero_shot_classes),
    "classifier": _kind(_classifier, _make_classifier, _classifier_classes),
    "detector": _kind(_detector, _make_detector, _detector_classes),
    "embedding": _kind(_image_model, _make_embedding),
    "source": _kind(_image_model, _make_source),
    "real": _kind(_image_model, _make_real),
    "nsfw": NSFW,
}
