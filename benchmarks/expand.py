"""Measures the expansion of recipes with a million samples: seconds, and peak memory.

    python benchmarks/expand.py [--samples 1000000] [--work FOLDER]

Each case runs in a process of its own: 250,000 rows with four variants each. ``plain`` has one
template and no draws; ``rich`` has three templates with groups and wildcards, a table of 100
classes and six fields; ``pairs`` gives each sample an image of another class, by reference, from a
table of 10,000. Memory is the peak resident set of the process. The bars are 60 s and 1 GB for a
million samples on 2 cores.

Writes ``results/expand.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.labels.columns import IMAGE
from batchgen.recipes.expand import expand
from batchgen.recipes.recipe import build_recipe

RESULTS = Path(__file__).parent / "results" / "expand.json"
CLASSES, IMAGES, VARIANTS = 100, 10_000, 4
FIELDS = {
    "guidance_scale": {"uniform": [1.5, 3.0], "step": 0.5},
    "strength": {"normal": {"mean": 0.5, "std": 0.15, "low": 0.3, "high": 0.8}, "step": 0.1},
    "num_inference_steps": {"choice": [20, 25, 30]},
    "eta": {"uniform": [0.0, 1.0]},
    "lora": {"choice": {"": 3, "ink:0.8": 1}},
    "scheduler": "DDIMScheduler",
}
RICH = {
    "plain": "a photo of a {{ class.name }}",
    "weather": {
        "text": "a {small|0.5::large} {{ class.name }} in {2$$ and $$rain|fog|snow}",
        "weight": 2,
    },
    "place": "{{ class.synonyms | pick }}, {{ class.definition }}, __places__, {day|night}",
}


def recipes(work: Path) -> dict[str, dict[str, Any]]:
    """The recipe of each case."""
    rows = {"from": str(work / "rows.parquet"), "seed": 7, "variants": VARIANTS}
    classes = [
        {"name": f"class {n}", "synonyms": [f"kind {n}", f"sort {n}"], "definition": f"thing {n}"}
        for n in range(CLASSES)
    ]
    pair = {"with": "other", "images": str(work / "images.parquet"), "label": "soft"}
    wildcards = str(work / "wildcards")
    return {
        "plain": {**rows, "templates": "a photo of a {{ label }}"},
        "rich": {
            **rows,
            **{"classes": classes, "templates": RICH, "fields": FIELDS, "wildcards": wildcards},
        },
        "pairs": {**rows, "templates": "a photo of a {{ label }}", "fields": FIELDS, "pair": pair},
    }


def prepare(work: Path, rows: int) -> None:
    """Write the rows, the images and the wildcards."""
    labels = [f"class {n % CLASSES}" for n in range(max(rows, IMAGES))]
    keys = [f"row-{n:07d}" for n in range(rows)]
    pq.write_table(pa.table({"key": keys, "label": labels[:rows]}), work / "rows.parquet")
    images = [{"bytes": None, "path": f"/photos/{n:05d}.jpg"} for n in range(IMAGES)]
    pool = {"key": [f"photo-{n}" for n in range(IMAGES)], "label": labels[:IMAGES]}
    table = pa.table({**pool, "image": pa.array(images, IMAGE)})
    pq.write_table(table, work / "images.parquet")
    (work / "wildcards").mkdir()
    places = "".join(f"place {n}\n" for n in range(1000))
    (work / "wildcards" / "places.txt").write_text(places)


def measure(name: str, work: str, results: Any) -> None:
    """Expand one recipe; puts seconds and peak memory into the queue."""
    recipe = build_recipe(recipes(Path(work))[name])
    begun = time.monotonic()
    made = expand(recipe, f"{work}/{name}.parquet")
    taken_s = time.monotonic() - begun
    usage = resource.getrusage(resource.RUSAGE_SELF)
    results.put(
        {
            "case": name,
            "samples": made.samples,
            "columns": len(made.columns),
            "seconds": round(taken_s, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mb": round(usage.ru_maxrss / 1024),
            "file_mb": round(Path(made.output).stat().st_size / 1e6, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--no-result", action="store_true", help="print only")
    given = parser.parse_args()
    cases = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        prepare(Path(work), given.samples // VARIANTS)
        for name in recipes(Path(work)):
            queue = spawn.Queue()
            process = spawn.Process(target=measure, args=(name, work, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} failed")
            cases.append(queue.get())
            print(cases[-1], flush=True)
    if given.no_result:
        return
    from benchmarks.sleepers import machine

    result = {
        "benchmark": "benchmarks/expand.py",
        **machine(),
        "versions": {"pyarrow": pa.__version__, "jinja2": jinja2.__version__},
        "bars": {"seconds": 60, "peak_mb": 1000},
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
