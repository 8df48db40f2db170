"""Turns a shard's rows into samples; rejects rows with missing or invalid values, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from batchgen.errors import RejectRow
from batchgen.images.conditions import size_for
from batchgen.images.source import Turn
from batchgen.input.uris import uris_of
from batchgen.labels.row import RowLabels
from batchgen.models import check_prompt
from batchgen.plain_text import short
from batchgen.plan.call_settings import Settings, read_setting
from batchgen.plan.columns import python_values
from batchgen.plan.keys import null_key, safe_key
from batchgen.plan.plan import Plan
from batchgen.records import Call, Dropped, Sample, ShardRows, derive_seed
from batchgen.shard.labels import labels_of, table_of
from batchgen.shard.row_images import fit_images, image_values, open_images
from batchgen.spec.call_settings import TEXT_SETTINGS
from batchgen.spec.sections import MAX_SIZE, MAX_TEXT, Seed
from batchgen.spec.spec import Spec
from batchgen.spec.splits import is_wanted
from batchgen.spec.tasks import is_image, task_named

Array = np.ndarray[Any, Any]
_LONGEST_SHOWN = 200
LEFT_OUT = "fails-its-shard"  # of reasons.FAILURES
CALL_FIELDS = frozenset(field.name for field in fields(Call))
_SEED: TypeAdapter[int] = TypeAdapter(Seed)
_TEXTS = ("key", "prompt", "negative_prompt", "class_label", "lora", "scheduler", *TEXT_SETTINGS)


@dataclass(frozen=True)
class Prepared:
    """Every planned sample of a shard, either to be generated or dropped.

    ``images``: for tasks with images, part -> row -> uint8 array at its planned size: RGB (height,
    width, 3), or for the part ``mask`` (height, width). ``labels``: the rows' labels on the images
    that will be made, in a table with the rows of the shard; None if the spec names no labels.
    """

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]
    images: dict[str, dict[int, Array]]
    labels: pa.Table | None = None


def prepare(
    rows: ShardRows,
    plan: Plan,
    without: Mapping[str, str] = MappingProxyType({}),
    working_on: Callable[[Iterable[str]], None] = lambda keys: None,
) -> Prepared:
    """Turn the shard's rows into samples; ``len(samples) + len(dropped)`` is what was planned.

    Args:
        rows: the rows of the shard.
        plan: the plan of the job.
        without: key -> error, for samples that are recorded as failed without being prepared.
        working_on: called with the keys of each row's samples before the row is prepared.
    """
    spec = plan.spec
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    parts = [part for part in spec.input.columns.mapped() if is_image(part)]
    images: dict[str, dict[int, Array]] = {part: {} for part in spec.image_parts}
    listed = list(_values(rows, spec))
    files = [*parts, "label_mask"] if spec.input.columns.label_mask else parts
    named = (values[part] for values in listed for part in files)
    wanted = (one for one in named if isinstance(one, str) and one)
    fetched = uris_of(spec).fetch(wanted, meanwhile=lambda: working_on(()))
    call: Call | None = None
    one_call = _is_one_call(spec)
    labels: list[RowLabels | None] = [None] * len(listed)
    for row, values in enumerate(listed):
        variants = _variants(rows, plan, row)
        key, source_id = _key(values, spec, rows.row_keys[row]), rows.source_ids[row]
        failing = {one: sample_key(key, one) for one in variants if sample_key(key, one) in without}
        dropped += [left_out(it, source_id, one, without[it]) for one, it in failing.items()]
        variants = [one for one in variants if one not in failing]
        working_on(sample_key(key, variant) for variant in variants)
        if not variants:
            continue
        try:
            _refuse_split(values, spec)
            _require_text(values, spec)
            with Turn() as turn:
                opened = open_images(values, parts, spec, fetched, turn)
                if call is None or not one_call:
                    call = _call(values, plan, opened.images)
                arrays = fit_images(opened, plan, call)
                labelled = labels_of(values, opened, arrays, plan, call, fetched)
                del opened
            if labelled.regions is not None:
                call = replace(call, regions=_setting(plan, "regions", labelled.regions))
            labels[row] = labelled.labels
            shared = _Row(key, source_id, row, call, values)
            samples += [_sample(shared, plan, variant) for variant in variants]
            for part, array in {**arrays, **labelled.images}.items():
                images[part][row] = array
        except RejectRow as error:
            dropped += [
                Dropped(
                    sample_key(key, variant),
                    source_id,
                    variant,
                    "rejected",
                    error.reason,
                    error.message,
                )
                for variant in variants
            ]
    table = table_of(labels, plan, rows.table.schema)
    return Prepared(tuple(samples), tuple(dropped), images, table)


def _is_one_call(spec: Spec) -> bool:
    """Whether no row has its own settings or size, so that all rows share one call."""
    columns = spec.input.columns.mapped().keys()
    same_size = spec.conditioning.resize != "multiple-of"
    return columns.isdisjoint(CALL_FIELDS) and same_size and "regions" not in spec.drawn


def left_out(key: str, source_id: str, variant: int, why: str) -> Dropped:
    """A sample that crashes its shard on every attempt, recorded as failed."""
    message = f"this sample crashed its shard on every attempt, the last time on its own: {why}"
    return Dropped(key, source_id, variant, "failed", LEFT_OUT, message)


def sample_key(key: str, variant: int) -> str:
    """The key of one variant of a row."""
    return f"{key}-v{variant}"


@dataclass(frozen=True)
class _Row:
    """The values that all samples of one row share."""

    key: str
    source_id: str
    row: int
    call: Call
    values: Mapping[str, Any]


def _values(rows: ShardRows, spec: Spec) -> Iterator[Mapping[str, Any]]:
    """For each row, part -> value of its column, except the label, which is copied unread."""
    lists = {}
    for part, name in spec.input.columns.mapped().items():
        if part == "label":
            continue
        column = rows.table.column(name)
        is_file = is_image(part) or part == "label_mask"
        if is_file and pa.types.is_struct(column.type):
            lists[part] = image_values(column)
        else:
            lists[part] = python_values(column)
    for row in range(rows.table.num_rows):
        yield {part: values[row] for part, values in lists.items()}


def _variants(rows: ShardRows, plan: Plan, row: int) -> list[int]:
    """The row's variants that belong to this shard: all, except in its first and last row."""
    if rows.variants:
        return [rows.variants[row]]
    per_row, lowest = plan.spec.variants, plan.place.first_variant
    global_row = rows.first_sample // per_row + row
    first = max(rows.first_sample, global_row * per_row)
    stop = min(rows.stop_sample, (global_row + 1) * per_row)
    return [lowest + sample - global_row * per_row for sample in range(first, stop)]


def _key(values: Mapping[str, Any], spec: Spec, fallback: str) -> str:
    if spec.input.columns.key is None:
        return fallback
    value = values["key"]
    if value is None:
        return null_key(fallback)
    return safe_key(value if isinstance(value, bytes) else str(value))


def _refuse_split(values: Mapping[str, Any], spec: Spec) -> None:
    """Reject a row of a split that ``input.splits`` does not list."""
    wanted, split = spec.input.splits, values.get("split")
    if wanted is not None and not is_wanted(split, wanted):
        found = "null" if split is None else repr(short(str(split)))
        raise RejectRow(
            "other-split", f"its split is {found}; input.splits allows {', '.join(wanted)}"
        )


def _require_text(values: Mapping[str, Any], spec: Spec) -> None:
    mapped = spec.input.columns.mapped()
    if "key" in values and values["key"] is None:
        raise RejectRow("null-key", f"column {mapped['key']!r} is null; every row needs a key")
    for part in _TEXTS:
        value = values.get(part)
        if isinstance(value, bytes):
            raise RejectRow(
                "not-utf8",
                f"column {mapped[part]!r} holds {_shown(value)}, which is not valid UTF-8",
            )
        if isinstance(value, str) and len(value) > MAX_TEXT and part != "key":
            raise RejectRow(
                f"long-{part}",
                f"column {mapped[part]!r} holds {len(value)} characters; allowed: up to {MAX_TEXT}",
            )


def _shown(value: object) -> str:
    """A value as shown in a message, shortened because a row may hold megabytes."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _setting(plan: Plan, name: str, value: Any) -> Any:
    """A setting of a call: the row's value, else the spec's, else the model's."""
    column = plan.spec.input.columns.mapped().get(name)
    if isinstance(value, float) and not math.isfinite(value):
        raise RejectRow(
            f"bad-{name}", f"column {column!r} holds {_shown(value)}; a number is needed"
        )
    try:
        return read_setting(Settings(plan.spec.sampling, plan.model, plan.spec.model), name, value)
    except ValueError as error:
        is_long = len(str(value)) > _LONGEST_SHOWN
        allowed = str(error).replace(str(value), "it") if is_long else str(error)
        where = f"column {column!r}" if column else f"conditioning.make.{name}"
        raise RejectRow(
            f"bad-{name}", f"{where} holds {_shown(value)}; allowed: {allowed}"
        ) from error


def _call(values: Mapping[str, Any], plan: Plan, opened: Mapping[str, Any]) -> Call:
    def setting(name: str) -> Any:
        return _setting(plan, name, values.get(name))

    width, height = setting("width"), setting("height")
    if opened and plan.spec.conditioning.resize == "multiple-of":
        times = plan.model.upscale
        first = next(iter(opened.values()))
        size = size_for(first, plan.model.multiple_of, times)
        width, height = size[0] * times, size[1] * times
        if max(width, height) > MAX_SIZE:
            raise RejectRow(
                "image-too-large",
                f"the generated image would have {width} x {height} pixels; allowed: up to "
                f"{MAX_SIZE} on each side",
            )
    later = ("width", "height", *plan.spec.drawn)
    others = (one.name for one in fields(Call) if one.name not in later)
    given = {name: setting(name) for name in others}
    if "image" not in opened:
        given["strength"] = None  # strength needs a source image, which is optional for this model
    call = Call(width=width, height=height, **given)
    if call.strength is not None and int(call.num_inference_steps * call.strength) < 1:
        raise RejectRow(
            "strength-too-low",
            f"strength {call.strength} leaves none of {call.num_inference_steps} steps to run; "
            "strength x num_inference_steps must be at least 1",
        )
    return call


def _sample(shared: _Row, plan: Plan, variant: int) -> Sample:
    spec, values = plan.spec, shared.values
    name = sample_key(shared.key, variant)
    negative = values.get("negative_prompt")
    return Sample(
        key=name,
        source_id=shared.source_id,
        row=shared.row,
        variant=variant,
        seed=_seed(values, spec, name, variant),
        prompt=_readable("prompt", _prompt(values, spec), spec),
        negative_prompt=_readable(
            "negative_prompt", spec.sampling.negative_prompt if negative is None else negative, spec
        ),
        call=shared.call,
        class_label=_class_label(values, plan),
    )


def _prompt(values: Mapping[str, Any], spec: Spec) -> str:
    """The row's prompt; empty if no column is mapped or if it is null and the task needs none."""
    prompt: Any = values.get("prompt")
    needed = "prompt" in values and task_named(spec.task).prompt_column is not None
    column = spec.input.columns.prompt
    if prompt is None and needed:
        raise RejectRow("null-prompt", f"column {column!r} is null; a prompt is needed")
    if needed and not str(prompt).strip():
        raise RejectRow(
            "empty-prompt", f"column {column!r} is {_shown(prompt)}; a prompt is needed"
        )
    return str(prompt or "")


def _readable(part: str, text: str, spec: Spec) -> str:
    """The unchanged text, if compel can parse its weights (where prompt weighting is on)."""
    if spec.model.prompt_weighting is None:
        return text
    try:
        check_prompt(text)
    except ValueError as error:
        raise RejectRow(f"bad-{part}", f"{part} is {_shown(text)}; allowed: {error}") from error
    return text


def _class_label(values: Mapping[str, Any], plan: Plan) -> int | None:
    """The class's number in the model; the row may give its number or its name."""
    if "class_label" not in values:
        return None
    value, names = values["class_label"], plan.model.class_names
    column = plan.spec.input.columns.class_label
    if value is None:
        raise RejectRow("null-class", f"column {column!r} is null; a class is needed")
    number = class_number(value, names)
    if number is not None:
        return number
    known = ", ".join([name for name in names if name][:5])
    named = f" or a class name ({known}, ...)" if known else ""
    allowed = f"a class number from 0 to {len(names) - 1}{named}"
    raise RejectRow("unknown-class", f"column {column!r} holds {_shown(value)}; allowed: {allowed}")


def class_number(value: Any, names: tuple[str, ...]) -> int | None:
    """The number of a class that is given by number or name; None if there is none."""
    if isinstance(value, int):
        return value if 0 <= value < len(names) else None
    return _class_numbers(names).get(value) if isinstance(value, str) else None


@cache
def _class_numbers(names: tuple[str, ...]) -> dict[str, int]:
    """Class name -> number; ``white shark, great white shark`` gives one class two names."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        for one in (name, *(part.strip() for part in name.split(","))):
            if one:
                numbers.setdefault(one, number)
    return numbers


def _seed(values: Mapping[str, Any], spec: Spec, key: str, variant: int) -> int:
    """The sample's seed.

    Without a seed in the row it is derived from the run's seed and the sample's key. The row's own
    seed is used as it is for variant 0, and derived with the key for the other variants.
    """
    value = values.get("seed")
    if value is None:
        return derive_seed(spec.seed, key)
    column = spec.input.columns.seed
    try:
        if isinstance(value, float) and not math.isfinite(value):
            raise RejectRow(
                "bad-seed", f"column {column!r} holds {_shown(value)}; a number is needed"
            )
        seed = _SEED.validate_python(value)
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise RejectRow(
            "bad-seed", f"column {column!r} holds {_shown(value)}; allowed: {allowed}"
        ) from error
    return seed if variant == 0 else derive_seed(seed, key)
