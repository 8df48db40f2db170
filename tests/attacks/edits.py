"""Inputs, specs and request bodies of attacks, and edits of finished outputs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def send(h: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: Any) -> None:
    h.send_response(status)
    for k, v in headers.items():
        h.send_header(k.replace("_", "-"), v)
    h.send_header("Content-Length", str(len(body)))
    h.end_headers()
    if h.command != "HEAD":
        h.wfile.write(body)


def png(color: Any = (200, 30, 30), size: Any = (32, 32), noise: bool = True) -> bytes:
    im = Image.new("RGB", size, color)
    if noise:
        for i in range(min(size)):
            im.putpixel((i, i), (0, 0, 0))
    b = io.BytesIO()
    im.save(b, "PNG")
    return b.getvalue()


def spec(inp: Path | str, out: Path | str, **dotted: Any) -> dict:
    d = {
        "input.path": str(inp),
        "output.url": str(out),
        "output.samples_per_shard": 4,
        "sampling.num_inference_steps": 1,
        "resources.batch_size": 4,
        "policy.rejected_limit": 1.0,
        "policy.failed_limit": 1.0,
    }
    return d | {k.replace("__", "."): v for k, v in dotted.items()}


def i2i(inp: Any, out: Path, **dotted: Any) -> dict:
    return spec(
        inp,
        out,
        **{
            "task": "image-to-image",
            "input__columns__image": "image",
            "sampling__num_inference_steps": 2,
            **dotted,
        },
    )


def fix_marker(out: Path, shard: int, **changes: Any) -> None:
    """Make marker sizes and hashes fit the files that now lie there."""
    f = out / "_batchgen" / "shards" / f"{shard:05d}.json"
    m = json.loads(f.read_text())
    for one in m["files"]:
        p = out / one["name"]
        if p.is_file():
            b = p.read_bytes()
            one["bytes"], one["sha256"] = len(b), hashlib.sha256(b).hexdigest()
    m |= changes
    f.write_text(json.dumps(m, indent=1))


def data_file(out: Path, shard: int = 0) -> Path:
    return sorted((out / "data").iterdir())[shard]


def retable(out: Path, fn: Callable[[pa.Table], pa.Table], shard: int = 0) -> None:
    """Edit a Parquet shard and its marker together."""
    f = data_file(out, shard)
    t = pq.read_table(f)
    new = fn(t)
    pq.write_table(new.replace_schema_metadata(t.schema.metadata), f)
    fix_marker(out, shard)


def set_cell(t: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    i = t.schema.get_field_index(column)
    v = t.column(i).to_pylist()
    v[row] = value(v[row]) if callable(value) else value
    return t.set_column(i, t.schema.field(i), pa.array(v, t.schema.field(i).type))
