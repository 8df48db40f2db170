"""Measures the memory of a job's processes while it writes a large output.

    python benchmarks/large_output.py [--gib 10] [--format parquet] [--s3] [FOLDER]

Every row has MIB_OF_ROW of noise in a column that is copied to the output, so that a small model
writes as many bytes as a large one. Memory is recorded ten times during the run: the unshared
memory (USS) of the driver, the replicas and the other workers, and the size of Ray's object store.
With ``--s3`` the output is written to a real S3 server (apt: radosgw ceph-mon ceph-osd), which
keeps it in memory. Adds one case to ``results/large_output.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from batchgen.output.ledger import SHARDS, Ledger
from batchgen.output.verify import verify
from batchgen.storage import configure, open_store

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.object_store.server import S3Server, make_bucket

MIB_OF_ROW = 3
ROWS_OF_FILE = 64
SAMPLES_PER_SHARD = 32
SAMPLES = 10
RESULTS = Path(__file__).parent / "results" / "large_output.json"
BUCKET = "large"


def write_input(folder: Path, gib: float) -> int:
    """Write files of ROWS_OF_FILE rows, four to a row group; returns the number of rows."""
    folder.mkdir()
    noise = random.Random(0)
    files = max(1, round(gib * 1024 / MIB_OF_ROW / ROWS_OF_FILE))
    for number in range(files):
        rows = {
            "prompt": [f"a red star {number} {row}" for row in range(ROWS_OF_FILE)],
            "ballast": [noise.randbytes(MIB_OF_ROW << 20) for _ in range(ROWS_OF_FILE)],
        }
        path = folder / f"{number:04d}.parquet"
        pq.write_table(pa.table(rows), path, row_group_size=4, compression="NONE")
    return files * ROWS_OF_FILE


def command(source: Path, output: str, kind: str) -> list[str]:
    settings = {
        "output.format": kind,
        "output.samples_per_shard": SAMPLES_PER_SHARD,
        "sampling.num_inference_steps": 4,
        "resources.batch_size": 16,
        "resources.generate": "{min_replicas: 1, max_replicas: 1}",
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    source_and_output = ["--input", str(source), "--output", output]
    return [sys.executable, "-m", "batchgen", "run", *source_and_output, *sets]


def role_of(process: psutil.Process, driver: int) -> str:
    words = " ".join(process.cmdline())
    if process.pid == driver:
        return "driver"
    if "MapWorker" in words:
        return "replicas"
    return "other workers" if words.startswith("ray::") else "ray itself"


def memory_of(driver: int) -> dict[str, int]:
    """Role -> the largest unshared memory, in MiB, of one process in the driver's tree."""
    found: dict[str, int] = defaultdict(int)
    tree = psutil.Process(driver)
    for process in (tree, *tree.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            role = role_of(process, driver)
            found[role] = max(found[role], process.memory_full_info().uss >> 20)
            if process.name() == "raylet":
                found["object store"] = object_store_bytes(process.pid) >> 20
    return dict(found)


def object_store_bytes(raylet: int) -> int:
    """Size of the object store's file in shared memory, which is unlinked but open."""
    total = 0
    for link in Path(f"/proc/{raylet}/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().name.startswith("plasma"):
                total += link.stat().st_blocks * 512
    return total


def watch(process: subprocess.Popen[bytes], output: str, shards: int) -> list[dict[str, Any]]:
    """After each tenth of the shards, the peak memory since the previous tenth."""
    store = open_store(output)
    seen: list[dict[str, Any]] = []
    most: dict[str, int] = {}
    began = time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            now = memory_of(process.pid)
            most = {role: max(mib, most.get(role, 0)) for role, mib in now.items()}
        committed = len(store.list(SHARDS))
        if committed * SAMPLES >= shards * (len(seen) + 1):
            seconds = round(time.monotonic() - began, 1)
            seen.append({"committed": committed, "seconds": seconds, "most_mib": most})
            print(json.dumps(seen[-1]), flush=True)
            most = {}
        time.sleep(1)
    return seen


@contextlib.contextmanager
def output_of(folder: Path, s3: bool, gib: float) -> Iterator[str]:
    if not s3:
        yield str(folder / "out")
        return
    server = S3Server(folder / "server", memory_bytes=int(gib * 1.3 * (1 << 30)))
    server.start()
    try:
        os.environ.update(server.exports)
        configure()
        make_bucket(server, BUCKET)
        yield f"s3://{BUCKET}/out"
    finally:
        server.stop()


def measure(folder: Path, gib: float, kind: str, s3: bool) -> dict[str, Any]:
    rows = write_input(folder / "in", gib)
    shards = -(-rows // SAMPLES_PER_SHARD)
    with output_of(folder, s3, gib) as output, (folder / "log").open("w+b") as log:
        began = time.monotonic()
        process = subprocess.Popen(command(folder / "in", output, kind), stdout=log, stderr=log)
        seen = watch(process, output, shards)
        wall_s = round(time.monotonic() - began, 1)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-2000:])
        findings = verify(Ledger(open_store(output)))
        written = sum(open_store(output).find("data").values())
    return {
        "output": "s3" if s3 else "local",
        "format": kind,
        "samples": rows,
        "shards": shards,
        "gib": round(written / (1 << 30), 2),
        "wall_s": wall_s,
        "verify": findings.problems or "passed",
        "seen": seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="where to put the input and a local output")
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--format", default="parquet")
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = measure(Path(folder), options.gib, options.format, options.s3)
    versions = {one.__name__: one.__version__ for one in (ray, torch, diffusers, pa)}
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, no GPU"
    case = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {machine}, Python {platform.python_version()}",
        "versions": versions,
        **case,
    }
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*before, case], indent=1) + "\n")
    print(json.dumps(case, indent=1))


if __name__ == "__main__":
    main()
