"""Runs every family on real Ray in both layouts, each replica in its own process: same bytes.

    python -m tests.chaos.families FOLDER --results benchmarks/results/families.json

The tests run the same streams in one process (`tests/model/test_family_stream.py`); this is the
long way, some twenty minutes on two cores, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import ray

from batchgen import runner
from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.shard.images import environment
from batchgen.storage import open_store
from jobs import task_inputs
from tests.family_specs import family_spec
from tests.outputs import digests_of

ONE = {"max_replicas": 1}
POOLS = {"generate": ONE, "encode": ONE, "denoise": ONE, "decode": ONE}


def one_family(family: Family, folder: Path, rows: Path) -> dict[str, Any]:
    """The results of both layouts."""
    model = folder / "model"
    if not model.exists():
        BUILDERS[family.task, family.name](model)
    digests, held, problems, start = {}, {}, [], time.perf_counter()
    for layout in ("fused", "staged"):
        output = folder / layout
        spec = family_spec(family, model, rows, output, layout=layout, **POOLS)
        outcome = runner.run(spec, quiet=True)
        ledger = Ledger(open_store(str(output)))
        problems += verify(ledger).problems
        digests[layout] = digests_of(output)
        marker = ledger.marker(0)
        held[layout] = marker.parameter_counts if marker else {}
        problems += [] if outcome.exit_code == 0 else [outcome.message]
    return {
        "task": family.task,
        "family": family.name,
        "pipeline": family.pipeline,
        "samples": len(digests["fused"]),
        "same_bytes_in_both_layouts": digests["fused"] == digests["staged"],
        "parameters": held["staged"],
        "problems": problems,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows = options.folder / "rows.parquet"
    if not rows.exists():
        task_inputs.main(str(rows))
    found = []
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    for family in FAMILIES:
        folder = options.folder / family.task / family.name
        done = folder / "done.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(one_family(family, folder, rows)))
        found.append(json.loads(done.read_text()))
        print({key: found[-1][key] for key in found[-1] if key != "parameters"}, flush=True)
    ray.shutdown()
    bad = [one for one in found if one["problems"] or not one["same_bytes_in_both_layouts"]]
    facts = {
        "what": "every family on Ray, tiny seeded models, both layouts, replicas in own processes",
        "date": datetime.date.today().isoformat(),
        "environment": environment("cpu"),
        "families": len(found),
        "same_bytes": len(found) - len(bad),
        "each": found,
    }
    if options.results:
        options.results.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
