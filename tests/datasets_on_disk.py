"""Small Parquet datasets on disk, a made-up model, and specs and plans for them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchgen.plan.choices import chosen
from batchgen.plan.plan import Plan, SourceFile, make_plan
from batchgen.records import DeviceInfo, ModelInfo
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tree import merge

MODEL = ModelInfo(
    model_id="paper/model",
    path="/nowhere/model",
    revision="0123456789ab",
    manifest_sha256="f" * 64,
    pipeline_class="StableDiffusionPipeline",
    family="stable-diffusion",
    scheduler="DDIMScheduler",
    latent_channels=4,
    vae_scale_factor=8,
    width=16,
    height=8,
    multiple_of=8,
    num_inference_steps=5,
    guidance_scale=3.0,
)
IMAGE_MODEL = replace(MODEL, settings=("strength",))


def spec_for(path: str | Path, output: str | Path = "out", **dotted: Any) -> Spec:
    """A spec over ``path``; further fields dotted, with ``__`` for the dot."""
    fields = {"input.path": str(path), "output.url": str(output)}
    fields |= {name.replace("__", "."): value for name, value in dotted.items()}
    return build(merge({}, fields))


def plan_for(path: str | Path, output: str | Path = "out", **dotted: Any) -> Plan:
    spec = spec_for(path, output, **dotted)
    return make_plan(spec, model_for(spec))


def model_for(spec: Spec) -> ModelInfo:
    """The made-up model for a task."""
    return IMAGE_MODEL if spec.task == "image-to-image" else MODEL


def paper_plan(rows_of_files: Sequence[Sequence[int]], **dotted: Any) -> Plan:
    """A plan for files of which only the row counts exist, made for the CPU."""
    files = tuple(
        SourceFile(f"/in/{index}.parquet", f"{index}.parquet", 100, "tag", tuple(groups))
        for index, groups in enumerate(rows_of_files)
    )
    rows = sum(file.rows for file in files)
    spec = chosen(spec_for("/in", **dotted), DeviceInfo())
    return Plan(spec, model_for(spec), files, (("prompt", "string"),), rows)


def write_table(path: Path, table: pa.Table, groups: Sequence[int] | None = None) -> Path:
    """Write a table with row groups of the given sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, store_schema=True) as writer:
        start = 0
        for rows in groups if groups is not None else [table.num_rows]:
            writer.write_table(table.slice(start, rows), row_group_size=max(1, rows))
            start += rows
    return path


def write_columns(path: Path, columns: Mapping[str, Any]) -> Path:
    return write_table(path, pa.table(dict(columns)))


def prompts(count: int, start: int = 0) -> list[str]:
    return [f"picture number {number}" for number in range(start, start + count)]


def write_prompts(path: Path, count: int, groups: Sequence[int] | None = None) -> Path:
    """``count`` rows with a prompt and the row's number."""
    table = pa.table({"prompt": prompts(count), "number": range(count)})
    return write_table(path, table, groups)


def png(width: int = 8, height: int = 8, colour: tuple[int, int, int] = (9, 99, 199)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(sink, "PNG")
    return sink.getvalue()


def text_column(values: Sequence[bytes]) -> pa.Array:
    """A text column of raw bytes that need not be UTF-8, as careless writers leave them."""
    return pa.array(values, pa.binary()).view(pa.string())
