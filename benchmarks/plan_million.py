"""Measures planning and reading of one million rows: seconds, peak memory, and bytes read.

    python benchmarks/plan_million.py [FOLDER]

Prints one JSON line for each of two cases: the rows in 100 files of 10 row groups, and in one file
of one row group. Both have a key column that planning checks for duplicates.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1_000_000


def table(first: int, rows: int) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table(
        {
            "id": [f"row-{number:09d}" for number in numbers],
            "prompt": [f"a photograph of object number {number}" for number in numbers],
        }
    )


def write_many(folder: Path) -> None:
    rows = ROWS // 100
    for number in range(100):
        path = folder / f"part-{number:03d}.parquet"
        pq.write_table(table(number * rows, rows), path, row_group_size=rows // 10)


def write_one(folder: Path) -> None:
    pq.write_table(table(0, ROWS), folder / "all.parquet", row_group_size=ROWS)


def measure(source: Path) -> dict[str, object]:
    """Plan, then read every shard once, as the readers would. Runs in a separate process."""
    from batchgen.input.reader import make_spans, read_columns, read_span
    from batchgen.runner import plan_job
    from batchgen.spec.build import build

    tree = {
        "input": {"path": str(source), "columns": {"key": "id"}},
        "output": {"url": str(source / "unused")},
    }
    start, cpu = time.perf_counter(), time.process_time()
    plan = plan_job(build(tree))
    planned, planned_cpu = time.perf_counter() - start, time.process_time() - cpu
    plan_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(file.size for file in plan.files)
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    spans = make_spans(plan, range(plan.shards))
    start, shards, rows, read_bytes = time.perf_counter(), 0, 0, 0
    for span in spans:
        for part in read_span(span, plan.spec, columns):
            shards, rows = shards + 1, rows + part.table.num_rows
            read_bytes += part.read_bytes
    return {
        "files": len(plan.files),
        "row_groups": sum(len(file.row_groups) for file in plan.files),
        "rows": plan.rows,
        "shards": plan.shards,
        "plan_s": round(planned, 2),
        "plan_cpu_s": round(planned_cpu, 2),
        "plan_peak_mb": round(plan_peak),
        "plan_json_bytes": len(plan.to_json()),
        "spans": len(spans),
        "read_s": round(time.perf_counter() - start, 2),
        "rows_read": rows,
        "shards_read": shards,
        "read_bytes_over_file_bytes": round(read_bytes / size, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for name, write in (("many files", write_many), ("one row group", write_one)):
            source = Path(folder) / name.replace(" ", "-")
            source.mkdir()
            write(source)
            code = "import json, pathlib, plan_million as b, sys; " + (
                "print(json.dumps(b.measure(pathlib.Path(sys.argv[1]))))"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, str(source)],
                cwd=Path(__file__).parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            print(json.dumps({"case": name, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
