"""Checks the labels of an input while planning: their columns, their categories, what is unsaid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from batchgen.errors import InputError, SpecError
from batchgen.labels.columns import object_fields
from batchgen.labels.truth import VOID, truth_of
from batchgen.spec.labels_section import Category, Labels
from batchgen.spec.model import Section
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import is_rewritten

_LIKE_LABELS = re.compile(
    r"(.*_)?(objects?|bbox(es)?|box(es)?|annotations?|segmentations?|polygons?|keypoints?|"
    r"(label|semantic|instance|panoptic)_?map|masks?)",
    re.IGNORECASE,
)
_ANNOTATED = ("bbox", "boxes", "segmentation", "keypoints")


def check_labels(spec: Spec, schema: pa.Schema, path: str) -> Spec:
    """Check the columns of labels; returns the spec with the categories that the input declares.

    Raises:
        InputError: a column of objects has another type.
        SpecError: a field of ``labels`` or a column that has no effect, or that is missing.
    """
    columns = spec.input.columns
    if not spec.has_labels:
        _refuse_idle(spec)
        return spec
    if columns.new_category is not None and spec.task != "inpainting":
        because = f"{spec.task} repaints no objects; remove it, or use --task inpainting"
        raise SpecError("input.columns.new_category", columns.new_category, "", because=because)
    if columns.objects is not None:
        _check_objects(spec, schema, path)
    return _completed(spec, schema)


def _check_objects(spec: Spec, schema: pa.Schema, path: str) -> None:
    """Refuse a column of objects of another type."""
    column = spec.input.columns.objects
    kind = schema.field(column).type
    fields = object_fields(kind)
    named = fields is not None and "bbox" in fields and {"category", "category_id"} & set(fields)
    if not named:
        raise InputError(
            f"input.columns.objects: column {column!r} in {path} has type {kind}; needed: "
            "a struct of lists, or a list of structs, with the fields bbox and category"
        )
    _check_new_category(spec, schema, fields or {}, path)
    category = (fields or {}).get("category", (fields or {}).get("category_id"))
    known = spec.labels.categories or _declared(schema, column)
    for part, made in spec.drawn.items():
        by_number = made.name == "objects-canvas" or made.options.get("category", -1) >= 0
        if by_number and not known and not pa.types.is_integer(category):
            because = (
                "the categories are text without numbers; list them in labels.categories, in the "
                "order of their numbers"
            )
            raise SpecError(f"conditioning.make.{part}", made.name, "", because=because)


def _completed(spec: Spec, schema: pa.Schema) -> Spec:
    """The spec with the names that the input declares, where it gives none itself."""
    labels, own = spec.labels, _own(schema)
    found: dict[str, object] = {}
    if labels.categories is None and spec.input.columns.objects is not None:
        found["categories"] = _declared(schema, spec.input.columns.objects)
    if labels.mask_classes is None and spec.input.columns.label_mask is not None:
        found["mask_classes"] = _categories(own.get("mask_classes"))
    if not labels.source and isinstance(own.get("source"), dict):
        found["source"] = own["source"]
    if not found:
        return spec
    completed = labels.model_copy(update=found)
    try:
        Labels.model_validate(completed.model_dump())
    except ValidationError as error:
        raise InputError(
            "the categories that the input's metadata declares cannot be used "
            f"({error.errors()[0]['msg']}); give them in labels.categories"
        ) from None
    return spec.model_copy(update={"labels": completed})


def _check_new_category(
    spec: Spec, schema: pa.Schema, fields: Mapping[str, pa.DataType], path: str
) -> None:
    """Without names, a new category must be of the type that the objects' categories have."""
    column = spec.input.columns.new_category
    if column is None or spec.labels.categories or _declared(schema, spec.input.columns.objects):
        return
    kinds = [schema.field(column).type, fields.get("category", fields.get("category_id"))]
    if len({bool(pa.types.is_integer(kind)) for kind in kinds}) > 1:
        raise InputError(
            f"input.columns.new_category: column {column!r} in {path} has type {kinds[0]}, and the "
            f"categories of the objects {kinds[1]}; needed: the same type, or labels.categories"
        )


def _refuse_idle(spec: Spec) -> None:
    """Refuse settings of labels, and columns about them, in a job without labels."""
    because = "no labels are read; set input.columns.objects or label_mask, or remove it"
    for name in ("new_category", "image_width", "image_height"):
        given = getattr(spec.input.columns, name)
        if given is not None:
            raise SpecError(f"input.columns.{name}", given, "null", because=because)
    for name, field in Labels.model_fields.items():
        value = getattr(spec.labels, name)
        if value != field.default:
            given = "a list" if isinstance(value, tuple | Section) else value
            raise SpecError(f"labels.{name}", given, "its default", because=because)


def _own(schema: pa.Schema) -> dict[str, Any]:
    """What an import has written into the metadata of the input."""
    try:
        tree = json.loads((schema.metadata or {}).get(b"batchgen") or b"{}")
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _categories(given: object) -> tuple[Category, ...] | None:
    try:
        return tuple(map(Category.model_validate, given)) if isinstance(given, list) else None
    except ValidationError:
        return None


def _declared(schema: pa.Schema, column: str | None) -> tuple[Category, ...] | None:
    """The categories that the input's metadata declares: batchgen's, else a ClassLabel's names."""
    if own := _categories(_own(schema).get("categories")):
        return own
    try:
        metadata = (schema.metadata or {}).get(b"huggingface") or b"{}"
        names = _names(json.loads(metadata)["info"]["features"][column])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return tuple(Category.model_construct(name=name) for name in names) if names else None


def _names(feature: object) -> list[str] | None:
    """The names of the ClassLabel of ``category``, at any depth of a feature."""
    if isinstance(feature, list):
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    for name in ("category", "category_id"):
        if name in feature:
            return _label_names(feature[name])
    return _names(feature.get("feature"))


def _label_names(feature: object) -> list[str] | None:
    if isinstance(feature, list):
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    names = feature.get("names") or _label_names(feature.get("feature"))
    return names if isinstance(names, list) and all(isinstance(one, str) for one in names) else None


def label_notes(spec: Spec, columns: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What a user should know about labels before the run.

    Args:
        spec: that of the plan.
        columns: name and type of each column of the input.
    """
    mapped = spec.input.columns.mapped()
    if spec.has_labels:
        regions = [one for one in ("regions",) if one in mapped or one in spec.drawn]
        parts = [*spec.image_parts, *regions]
        made = any(part != "mask" for part in spec.drawn)
        strength = spec.sampling.strength if "strength" not in mapped else 0.0
        if truth_of(spec.labels, spec.task, strength, parts, made) == VOID:
            yield (
                f"the labels are void: {spec.task}{_why_void(spec)} does not keep objects where "
                "they are, so no objects and label masks are written (labels.are says otherwise)"
            )
    read = {name for part, name in mapped.items() if is_rewritten(part)}
    keep = spec.input.keep_columns
    for name, kind in columns:
        kept = name not in read if keep is None else name in keep
        if kept and name not in mapped.values() and _looks_like_labels(name, kind):
            yield (
                f"column {name!r} looks like labels on pixels, and is copied as it is, although "
                "the images made have other pixels; name it in input.columns.objects or "
                "label_mask, or leave it out with input.keep_columns"
            )


def _why_void(spec: Spec) -> str:
    if spec.task != "image-to-image":
        return ""
    limit = f"{spec.labels.max_strength:g} (labels.max_strength)"
    return f" at strength {spec.sampling.strength:g}, above {limit},"


def _looks_like_labels(name: str, kind: str) -> bool:
    nested = kind.startswith(("list<", "large_list<", "struct<", "binary", "large_binary", "fixed"))
    annotated = any(f"{field}: " in kind for field in _ANNOTATED)
    return nested and (annotated or _LIKE_LABELS.fullmatch(name) is not None)
