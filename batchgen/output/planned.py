"""Computes from a plan what its output's rows must contain: keys, seeds, settings, column types."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen.labels.columns import OBJECTS
from batchgen.output.formats import (
    conditioning_text,
    kept_columns,
    lora_text,
    own_columns,
)
from batchgen.plan.call_settings import Settings, read_setting
from batchgen.plan.keys import row_key
from batchgen.plan.plan import Plan, SourceFile
from batchgen.spec.tasks import is_image, is_rewritten

_SETTINGS = ("num_inference_steps", "guidance_scale", "strength", "width", "height")
_VIEWS = (
    *(("string_view", "string"), ("binary_view", "binary")),
    *(("large_list_view<", "large_list<"), ("list_view<", "list<")),
)
ANY_OBJECTS = "struct<bbox: "  # the beginning of the type; the rest depends on the input's fields
_ELEMENT = re.compile(r"list<[^:<>]*: ")
_ENTRIES = re.compile(r" \('[^']*'\)>")


@dataclass(frozen=True)
class Names:
    """The names of a shard's samples, in the plan's order; each array has shape (samples,)."""

    sources: pa.StringArray
    variants: pa.Int32Array
    keys: pa.StringArray | None  # None if the keys come from a column of the input


def names_of(plan: Plan, shard: int) -> Names:
    """A shard's sample names, computed from the plan without reading the input."""
    if plan.place.listed:
        return _listed_names(plan, shard)
    first, stop = plan.sample_range(shard)
    per_row = plan.spec.variants
    lead = first % per_row  # variants of the first row that belong to the previous shard
    rows = list(_rows(plan, shard))
    sources = [f"{file.name}#{row}" for file, span in rows for row in span]
    numbers = np.arange(lead, lead + stop - first, dtype=np.int64)
    lowest = plan.place.first_variant
    variants = pa.array((lowest + numbers % per_row).astype(np.int32))
    places = pa.array(numbers // per_row)
    keys = None
    if plan.spec.input.columns.key is None:
        stems = [f"{stem}{row:08d}" for stem, span in _stems(rows) for row in span]
        ends = [f"-v{variant}" for variant in range(lowest, lowest + per_row)]
        if per_row == 1:
            keys = pa.array([f"{stem}{ends[0]}" for stem in stems], pa.string())
        else:
            every = [stem + end for stem in stems for end in ends]
            keys = pa.array(every[lead : lead + stop - first], pa.string())
    return Names(pa.array(sources, pa.string()).take(places), variants, keys)


def _listed_names(plan: Plan, shard: int) -> Names:
    """The names of a shard of a part that lists its samples."""
    first, stop = plan.sample_range(shard)
    variants = plan.listed.variants[first:stop]
    places = [plan.locate(row) for row in plan.listed.rows[first:stop].tolist()]
    keys = None
    if plan.spec.input.columns.key is None:
        pairs = zip(places, variants.tolist(), strict=True)
        texts = [f"{row_key(file.name, row)}-v{variant}" for (file, row), variant in pairs]
        keys = pa.array(texts, pa.string())
    sources = [f"{file.name}#{row}" for file, row in places]
    return Names(pa.array(sources, pa.string()), pa.array(variants, pa.int32()), keys)


def _rows(plan: Plan, shard: int) -> Iterator[tuple[SourceFile, range]]:
    """The shard's rows by file, with their numbers in the file."""
    row, stop = plan.row_range(shard)
    while row < stop:
        file, inside = plan.locate(row)
        count = min(file.rows - inside, stop - row)
        yield file, range(inside, inside + count)
        row += count


def _stems(rows: list[tuple[SourceFile, range]]) -> Iterator[tuple[str, range]]:
    """For each file, the part of the key that its rows share."""
    for file, span in rows:
        yield row_key(file.name, 0).removesuffix("00000000"), span


def seeds_of(plan: Plan, keys: list[bytes]) -> pa.Int64Array:
    """``records.derive_seed`` of every key with the run's seed, vectorized."""
    start, blake2b = f"{plan.spec.seed}\x1f".encode(), hashlib.blake2b
    digests = b"".join([blake2b(start + key, digest_size=8).digest() for key in keys])
    return pa.array((np.frombuffer(digests, ">u8") >> np.uint64(1)).astype(np.int64))


def constants_of(plan: Plan) -> dict[str, Any]:
    """Column -> its value, for columns that have the same value in every row of the output."""
    spec, model = plan.spec, plan.model
    mapped = spec.input.columns.mapped()
    settings = Settings(spec.sampling, model, spec.model)
    names = own_columns(spec, model.settings).names
    settable = [name for name in (*_SETTINGS, *model.settings) if name in names]
    found = {name: read_setting(settings, name, None) for name in settable}
    images = [part for part in mapped if is_image(part)]
    if "image" not in images:
        found["strength"] = None
    if images and spec.conditioning.resize == "multiple-of":
        del found["width"], found["height"]
    found |= {
        "task": spec.task,
        "model_id": model.model_id,
        "model_revision": model.revision,
        "scheduler": model.scheduler,
        "prompt": "",
        "negative_prompt": spec.sampling.negative_prompt,
        "label": None,
        "lora": lora_text(read_setting(settings, "lora", None)),
        "conditioning": conditioning_text(spec),
        "approximate": spec.sampling.approximate.label,
    }
    return {name: value for name, value in found.items() if name in names and name not in mapped}


def columns_of(plan: Plan) -> dict[str, str]:
    """Column -> its type as text, in the order of the output."""
    spec, settings = plan.spec, plan.model.settings
    given = dict(plan.columns)
    columns = {field.name: type_text(str(field.type)) for field in own_columns(spec, settings)}
    if spec.input.columns.label is not None:
        columns["label"] = type_text(given[spec.input.columns.label])
    if spec.input.columns.objects is not None:
        columns[OBJECTS] = ANY_OBJECTS
    mapped, kept = spec.input.columns.mapped(), spec.input.keep_columns
    rewritten = {name for part, name in mapped.items() if is_rewritten(part)} - set(kept or ())
    used = set(mapped.values()) if kept is None else {*kept, *mapped.values()}
    read = [name for name in given if kept is None or name in used]
    names = [name for name in read if name not in rewritten]
    for name, output in kept_columns(spec, names, settings).items():
        columns[output] = type_text(given[name])
    return columns


def is_planned(kind: str, planned: str) -> bool:
    """Whether a column's type, as text, is the planned one, see ``columns_of``."""
    return kind.startswith(planned) if planned == ANY_OBJECTS else kind == planned


def type_text(kind: str) -> str:
    """A type's name with views replaced by the plain types; see ``formats.tables.stored_type``.

    The names of list elements and map entries are left out, because Parquet files change them.
    """
    for view, plain in _VIEWS:
        kind = kind.replace(view, plain)
    return _ENTRIES.sub(">", _ELEMENT.sub("list<", kind))
