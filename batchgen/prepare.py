"""A shard's rows become samples to make; a row that cannot is rejected with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from batchgen.errors import RejectRow
from batchgen.images import decode_condition
from batchgen.plan import python_values, safe_key
from batchgen.records import Call, Dropped, Sample, ShardRows, derive_seed
from batchgen.spec import Guidance, Seed, Size, Spec, Steps, Strength

_OVERRIDES: dict[str, TypeAdapter[Any]] = {
    "seed": TypeAdapter(Seed),
    "num_inference_steps": TypeAdapter(Steps),
    "guidance_scale": TypeAdapter(Guidance),
    "strength": TypeAdapter(Strength),
    "width": TypeAdapter(Size),
    "height": TypeAdapter(Size),
}


@dataclass(frozen=True)
class Prepared:
    """Every planned sample of a shard, as one to make or one dropped.

    ``images``: for image tasks, row -> uint8 RGB (height, width, 3).
    """

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]
    images: dict[int, np.ndarray[Any, Any]]


def prepare(rows: ShardRows, spec: Spec) -> Prepared:
    """Turn the shard's rows into samples; ``len(samples) + len(dropped)`` is what was planned."""
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    images: dict[int, np.ndarray[Any, Any]] = {}
    for row, values in enumerate(_values(rows, spec)):
        variants = _variants(rows, spec.variants, row)
        key, source_id = _key(values, spec, rows.row_keys[row]), rows.source_ids[row]
        try:
            made = [_sample(values, spec, key, source_id, row, variant) for variant in variants]
            if spec.task == "image-to-image":
                images[row] = decode_condition(
                    values["image"], made[0].call.width, made[0].call.height
                )
            samples += made
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
    return Prepared(tuple(samples), tuple(dropped), images)


def sample_key(key: str, variant: int) -> str:
    """The key of one variant of a row."""
    return f"{key}-v{variant}"


def _values(rows: ShardRows, spec: Spec) -> Iterator[Mapping[str, Any]]:
    """For each row, the value of every mapped part."""
    mapped = spec.input.columns.mapped()
    table = rows.table
    columns = {part: table.column(name) for part, name in mapped.items()}
    if "image" in columns and pa.types.is_struct(columns["image"].type):
        columns["image"] = pc.struct_field(columns["image"], "bytes")
    lists = {part: python_values(column) for part, column in columns.items()}
    for row in range(table.num_rows):
        yield {part: values[row] for part, values in lists.items()}


def _variants(rows: ShardRows, per_row: int, row: int) -> list[int]:
    """The variants of the shard's row that lie in the shard: all but at its two ends."""
    global_row = rows.first_sample // per_row + row
    first = max(rows.first_sample, global_row * per_row)
    stop = min(rows.stop_sample, (global_row + 1) * per_row)
    return [sample - global_row * per_row for sample in range(first, stop)]


def _key(values: Mapping[str, Any], spec: Spec, fallback: str) -> str:
    if spec.input.columns.key is None:
        return fallback
    value = values["key"]
    return f"null-key-{fallback}" if value is None else safe_key(str(value))


def _sample(
    values: Mapping[str, Any], spec: Spec, key: str, source_id: str, row: int, variant: int
) -> Sample:
    if "key" in values and values["key"] is None:
        raise RejectRow("null-key", f"column {spec.input.columns.key!r} is null; a key is needed")
    for part in ("key", "prompt", "negative_prompt"):
        if isinstance(values.get(part), bytes):
            column = getattr(spec.input.columns, part)
            raise RejectRow("not-utf8", f"column {column!r} holds {values[part]!r}; allowed: UTF-8")
    sampling = spec.sampling
    call = Call(
        num_inference_steps=_setting(values, spec, "num_inference_steps"),
        guidance_scale=float(_setting(values, spec, "guidance_scale")),
        strength=_setting(values, spec, "strength") if spec.task == "image-to-image" else None,
        width=_setting(values, spec, "width"),
        height=_setting(values, spec, "height"),
    )
    if call.strength is not None and int(call.num_inference_steps * call.strength) < 1:
        raise RejectRow(
            "strength-too-low",
            f"strength {call.strength} of {call.num_inference_steps} steps leaves no step; "
            "allowed: strength * num_inference_steps of at least 1",
        )
    name = sample_key(key, variant)
    negative = values.get("negative_prompt")
    return Sample(
        key=name,
        source_id=source_id,
        row=row,
        variant=variant,
        seed=_seed(values, spec, name, variant),
        prompt=_prompt(values, spec),
        negative_prompt=sampling.negative_prompt if negative is None else negative,
        call=call,
    )


def _prompt(values: Mapping[str, Any], spec: Spec) -> str:
    if "prompt" not in values:
        return ""
    prompt = values["prompt"]
    column = spec.input.columns.prompt
    if prompt is None:
        raise RejectRow("null-prompt", f"column {column!r} is null; a prompt is needed")
    if not prompt.strip():
        raise RejectRow("empty-prompt", f"column {column!r} is {prompt!r}; a prompt is needed")
    return str(prompt)


def _setting(values: Mapping[str, Any], spec: Spec, name: str) -> Any:
    """The row's own value where its column has one, else the spec's."""
    value = values.get(name)
    if value is None:
        return getattr(spec.sampling, name)
    return _checked(name, value, spec)


def _seed(values: Mapping[str, Any], spec: Spec, key: str, variant: int) -> int:
    """The row's own seed for its first variant; every other seed is derived from the key."""
    value = values.get("seed")
    if value is None:
        return derive_seed(spec.seed, key)
    seed = int(_checked("seed", value, spec))
    return seed if variant == 0 else derive_seed(seed, key)


def _checked(name: str, value: Any, spec: Spec) -> Any:
    column = getattr(spec.input.columns, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise RejectRow(f"bad-{name}", f"column {column!r} holds {value!r}; a number is needed")
    try:
        return _OVERRIDES[name].validate_python(value)
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise RejectRow(
            f"bad-{name}", f"column {column!r} holds {value!r}; allowed: {allowed}"
        ) from error
