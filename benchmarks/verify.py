"""Compares the time of `verify` on a large output between this tree and another checkout.

    python benchmarks/verify.py --against CHECKOUT [--samples 1000000] [--rounds 3] [FOLDER]

The other checkout creates the output, tiny images from arithmetic stages, with its own reader and
writer, so that both trees can verify it. Each verification is a separate process, with the files in
the page cache. This tree skips ``decode`` for the comparison, because the other may not have that
check, and measures it separately. Adds one case to ``results/verify.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "verify.json"
BUILD = """
import sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for

folder, samples, per_shard, kind = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
texts = pa.array(f"a picture of number {number}" for number in range(samples))
pq.write_table(pa.table({"prompt": texts}), folder + "/in.parquet", row_group_size=100_000)
settings = {"samples_per_shard": per_shard, "format": kind}
plan = plan_for(
    folder + "/in.parquet",
    folder + "/out",
    resources__batch_size=256,
    **{"output__" + name: value for name, value in settings.items()},
)
make_output(plan, Ledger(open_store(folder + "/out")))
"""


def in_tree(tree: Path, *words: str) -> float:
    """The run time, in seconds, of a Python process that imports ``tree``."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([sys.executable, *words], env=environment, cwd=tree, check=True)
    return round(time.monotonic() - began, 2)


def verify(tree: Path, output: Path, *more: str) -> float:
    return in_tree(tree, "-m", "batchgen", "verify", str(output), *more)


def measure(folder: Path, against: Path, samples: int, per_shard: int, kind: str, rounds: int):  # type: ignore[no-untyped-def]
    built_s = in_tree(against, "-c", BUILD, str(folder), str(samples), str(per_shard), kind)
    print(f"built in {built_s} s", flush=True)
    out = folder / "out"
    quick = ("--skip", "decode")
    times: dict[str, list[float]] = {"before": [], "now": []}
    verify(against, out)  # fills the page cache
    for _ in range(rounds):
        times["before"].append(verify(against, out))
        times["now"].append(verify(HERE, out, *quick))
        print(json.dumps(times), flush=True)
    decoded_s = verify(HERE, out)
    return {
        "samples": samples,
        "samples_per_shard": per_shard,
        "format": kind,
        "seconds": {**times, "now, with decode": decoded_s},
        "ratio": round(min(times["now"]) / min(times["before"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--samples-per-shard", type=int, default=5_000)
    parser.add_argument("--format", default="parquet")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        facts = (given.samples, given.samples_per_shard, given.format, given.rounds)
        case: dict[str, Any] = measure(Path(folder), given.against.resolve(), *facts)
    case |= {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "measured": datetime.now(UTC).date().isoformat(),
    }
    cases = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*cases, case], indent=1) + "\n")
    print(json.dumps(case))


if __name__ == "__main__":
    main()
