"""Builds the tables of the output: accepted samples, and rejected and failed ones."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.images.conditions import describe
from batchgen.labels.columns import IMAGE, OBJECTS, labels_schema, mark_crowd, objects_feature
from batchgen.labels.makers import EVERY_MAKER
from batchgen.output.formats.json_values import to_json
from batchgen.plain_text import short
from batchgen.plan.plan import Plan
from batchgen.plan.scores import score_columns
from batchgen.records import Dropped, Sample, ShardRows
from batchgen.spec.call_settings import CALL_SETTINGS, CallSetting
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import FOLLOWING, is_rewritten

MOST_LABELS = 100
_ANY_OBJECTS = pa.struct([])  # their type depends on the input, see `output_schema`
_TYPES = {int: pa.int32(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}

COLUMNS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("image", IMAGE),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("label", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("variant", pa.int32()),
        pa.field("source_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("model_id", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("scheduler", pa.string()),
        pa.field("num_inference_steps", pa.int32()),
        pa.field("guidance_scale", pa.float64()),
        pa.field("strength", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("prompt_truncated", pa.bool_()),
    ]
)


def _kind_of(setting: CallSetting) -> pa.DataType:
    kind = _TYPES[setting.kind]
    return pa.list_(kind) if setting.several else kind


def _is_extra(setting: str) -> bool:
    return setting not in COLUMNS.names


# Further columns, each present if the task or model uses it.
EXTRA_COLUMNS = pa.schema(
    [
        pa.field("class_label", pa.int32()),
        *(pa.field(name, _kind_of(one)) for name, one in CALL_SETTINGS.items() if _is_extra(name)),
        pa.field("lora", pa.string()),
        pa.field("conditioning", pa.string()),
        pa.field("approximate", pa.string()),
        pa.field("unsigned_sha256", pa.string()),
    ]
)
REJECT_COLUMNS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("variant", pa.int32()),
        pa.field("outcome", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)


@dataclass(frozen=True)
class Finished:
    """One accepted sample: its image's stored bytes, and its scores by column.

    ``failed``: for each object, whether it becomes ``iscrowd``, since a scorer did not find it.
    """

    sample: Sample
    image: bytes
    truncated: bool
    scores: Mapping[str, Any]
    failed: Sequence[bool] | None = None


def own_columns(spec: Spec, settings: Sequence[str] = ()) -> pa.Schema:
    """batchgen's columns for a spec and its model's settings, without those of the input."""
    present = {
        "class_label": spec.input.columns.class_label is not None,
        "lora": bool(spec.model.loras),
        "conditioning": bool(spec.image_parts),
        "approximate": bool(spec.sampling.approximate.names),
        "unsigned_sha256": spec.output.signed,
    }
    extra = [one for one in EXTRA_COLUMNS if present.get(one.name, one.name in settings)]
    if spec.has_labels:
        columns = spec.input.columns
        objects = None if columns.objects is None else _ANY_OBJECTS
        extra += labels_schema(objects, columns.label_mask is not None)
    scores = [pa.field(column.name, column.kind) for column in score_columns(spec)]
    return pa.schema([*COLUMNS, *scores, *extra])


def kept_columns(spec: Spec, names: Sequence[str], settings: Sequence[str] = ()) -> dict[str, str]:
    """Source column -> its name in the output.

    A column that is mapped to a part and has the part's name (``prompt``) is in the output already.
    Any other column with the name of one of batchgen's becomes ``source_<name>``; so do ``key`` and
    ``seed``, since samples have their own.
    """
    columns = spec.input.columns
    wanted = spec.input.keep_columns
    if wanted is None:
        rewritten = {name for part, name in columns.mapped().items() if is_rewritten(part)}
        wanted = tuple(name for name in names if name not in rewritten)
    ours = {*own_columns(spec, settings).names, *(FOLLOWING if spec.has_labels else ())}
    same = {part for part, name in columns.mapped().items() if part == name and part in ours}
    same -= {"image", "key", "seed", *FOLLOWING}
    kept: dict[str, str] = {}
    for name in names:
        if name in wanted and name not in same:
            output = f"source_{name}" if name in ours else name
            while output in kept.values() or (output != name and output in {*names, *ours}):
                output += "_"
            kept[name] = output
    return kept


def output_schema(
    spec: Spec,
    source: pa.Schema,
    settings: Sequence[str] = (),
    labels: pa.Schema | None = None,
) -> pa.Schema:
    """The schema of the data files, with the Hugging Face features that make images decode.

    Args:
        spec: names the columns' parts.
        source: the input's schema.
        settings: the settings of a call that the model takes.
        labels: the schema of the labels' columns; None without labels.
    """
    columns = own_columns(spec, settings)
    for field in labels or ():
        columns = columns.set(columns.get_field_index(field.name), field)
    label = spec.input.columns.label
    if label is not None:
        index = columns.get_field_index("label")
        columns = columns.set(index, _stored_field(source.field(label), "label"))
    kept = kept_columns(spec, source.names, settings)
    for name, output in kept.items():
        columns = columns.append(_stored_field(source.field(name), output))
    features = _features(spec, source, kept)
    for field in labels or ():
        if field.name == OBJECTS:
            features[OBJECTS] = objects_feature(field.type, spec.labels.names)
        elif field.type == IMAGE:
            features[field.name] = {"_type": "Image"}
    return columns.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _stored_field(field: pa.Field, name: str) -> pa.Field:
    return field.with_name(name).with_type(stored_type(field.type)).remove_metadata()


def stored_type(kind: pa.DataType) -> pa.DataType:
    """The type that a source column has in the output: views become the plain types.

    Arrow cannot take rows from most view types, and other readers do not support them.
    """
    types = pa.types
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(_inside(kind.value_field))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(_inside(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_inside(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_inside(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(_inside(kind.key_field), _inside(kind.item_field), kind.keys_sorted)
    return kind


def _inside(field: pa.Field) -> pa.Field:
    return field.with_type(stored_type(field.type))


def _features(spec: Spec, source: pa.Schema, kept: dict[str, str]) -> dict[str, Any]:
    """Hugging Face features for images, and those that the input declares for kept columns."""
    label = spec.input.columns.label
    copies = [*kept.items(), *([(label, "label")] if label else [])]
    known = _inherited((source.metadata or {}).get(b"huggingface", b""))
    features = {output: known[name] for name, output in copies if name in known}
    return {**features, "image": {"_type": "Image"}}


def _inherited(metadata: bytes) -> dict[str, Any]:
    """The features in the input's metadata; empty if it has another shape."""
    try:
        tree = json.loads(metadata)
    except (ValueError, RecursionError):
        return {}
    for name in ("info", "features"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    known = tree.items() if isinstance(tree, dict) else ()
    return {name: told for name, told in known if isinstance(told, dict | list)}


def data_table(
    plan: Plan, rows: ShardRows, finished: Sequence[Finished], labels: pa.Table | None = None
) -> pa.Table:
    """The accepted samples of a shard as a table with the output's columns.

    They are in the plan's order, so the same shard always gives the same files, to the byte.
    ``labels`` has one row for each of ``rows``; None without labels.
    """
    finished = sorted(finished, key=lambda one: (one.sample.row, one.sample.variant))
    spec, source = plan.spec, rows.table
    told = None if labels is None else labels.schema
    schema = output_schema(spec, source.schema, plan.model.settings, told)
    extension = image_extension(spec)
    samples = [one.sample for one in finished]
    positions = pa.array([sample.row for sample in samples], pa.int64())
    images = [{"bytes": one.image, "path": f"{one.sample.key}.{extension}"} for one in finished]
    values: dict[str, Any] = {
        "key": [sample.key for sample in samples],
        "image": images,
        "prompt": [sample.prompt for sample in samples],
        "negative_prompt": [sample.negative_prompt for sample in samples],
        "label": [None] * len(samples),
        "seed": [sample.seed for sample in samples],
        "variant": [sample.variant for sample in samples],
        "source_id": [sample.source_id for sample in samples],
        "task": [spec.task] * len(samples),
        "model_id": [plan.model.model_id] * len(samples),
        "model_revision": [plan.model.revision] * len(samples),
        "scheduler": [sample.call.scheduler or plan.model.scheduler for sample in samples],
        "num_inference_steps": [sample.call.num_inference_steps for sample in samples],
        "guidance_scale": [sample.call.guidance_scale for sample in samples],
        "strength": [sample.call.strength for sample in samples],
        "width": [sample.call.width for sample in samples],
        "height": [sample.call.height for sample in samples],
        "sha256": [hashlib.sha256(one.image).hexdigest() for one in finished],
        "prompt_truncated": [one.truncated for one in finished],
        **{
            column.name: [one.scores[column.name] for one in finished]
            for column in score_columns(spec)
        },
        "class_label": [sample.class_label for sample in samples],
        "lora": [lora_text(sample.call.lora) for sample in samples],
        "conditioning": [conditioning_text(spec)] * len(samples),
        "approximate": [spec.sampling.approximate.label] * len(samples),
        **{
            name: [getattr(sample.call, name) for sample in samples]
            for name in EXTRA_COLUMNS.names
            if name in plan.model.settings
        },
    }
    if spec.input.columns.label is not None:
        values["label"] = _taken(source.column(spec.input.columns.label), positions)
    if labels is not None:
        values |= {name: labels.column(name).take(positions) for name in labels.column_names}
        if any(one.failed for one in finished):
            values[OBJECTS] = mark_crowd(values[OBJECTS], [one.failed for one in finished])
    for name, output in kept_columns(spec, source.schema.names, plan.model.settings).items():
        values[output] = _taken(source.column(name), positions)
    arrays = [
        values[field.name]
        if isinstance(values[field.name], pa.ChunkedArray)
        else pa.array(values[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _taken(column: pa.ChunkedArray, positions: pa.Array) -> pa.ChunkedArray:
    kind = stored_type(column.type)
    return (column if kind == column.type else column.cast(kind)).take(positions)


def label_counts(plan: Plan, rows: ShardRows, finished: Sequence[Finished]) -> dict[str, int]:
    """Label -> number of accepted samples, for the MOST_LABELS most frequent labels of a shard."""
    column = plan.spec.input.columns.label
    if column is None:
        return {}
    positions = pa.array([one.sample.row for one in finished], pa.int64())
    values = _taken(rows.table.column(column), positions)
    counts = Counter(short(_label_text(value)) for value in values if value.is_valid)
    return dict(counts.most_common(MOST_LABELS))


def _label_text(value: pa.Scalar) -> str:
    try:
        return str(value.as_py())
    except (ValueError, OverflowError):  # a date that Python cannot express, such as year 11103
        return str(to_json(pa.repeat(value, 1))[0])


def image_extension(spec: Spec) -> str:
    """The extension of the image files."""
    return {"jpeg": "jpg"}.get(spec.output.image_format, spec.output.image_format)


def lora_text(lora: tuple[tuple[str, float], ...] | None) -> str:
    """LoRA weights in the form of a row's column ``lora``: ``name:weight,name:weight``."""
    return ",".join(f"{name}:{weight:g}" for name, weight in lora or ())


def conditioning_text(spec: Spec) -> str:
    """How the conditioning images were prepared: ``image: fill; control: canny(low=100), fill``."""
    made = {
        part: describe(one.name, one.options, EVERY_MAKER)
        for part, one in spec.conditioning.make.items()
    }
    resize = spec.conditioning.resize
    parts = [(part, [made[part]] if part in made else []) for part in spec.image_parts]
    fitted = [(part, [*how, *([] if part in spec.drawn else [resize])]) for part, how in parts]
    return "; ".join(f"{part}: {', '.join(how)}" for part, how in fitted)


def rejects_table(dropped: Sequence[Dropped]) -> pa.Table:
    rows = sorted(dropped, key=lambda one: one.key)
    return pa.Table.from_pydict(
        {name: [getattr(one, name) for one in rows] for name in REJECT_COLUMNS.names},
        schema=REJECT_COLUMNS,
    )
