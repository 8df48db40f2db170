"""Samples of five families, generated again from their rows alone: are they the same?

    python benchmarks/replays.py [--samples 100] [--other-python PATH]

Runs a job of each family on local Ray (tiny models, and the shipped one), draws samples at random,
and replays them. Then some are replayed where torch chooses other kernels (another instruction
set), and, with ``--other-python``, by an interpreter with another version of torch: how far are
these images from the stored ones? Writes ``results/replays.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # before torch computes anything, as the command does

from batchgen import runner
from batchgen.curate.replay import replay
from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from jobs import task_inputs
from tests.family_specs import family_spec

ROOT = Path(__file__).parents[1]
FAMILY_LAYOUTS = {
    ("image-to-image", "stable-diffusion-xl"): "fused",
    ("text-to-image", "flux"): "staged",
    ("text-to-image", "stable-diffusion-3"): "fused",
    ("control", "controlnet"): "staged",
}
ELSEWHERE = 5  # samples of each family
CHILD = """
import json, sys
from batchgen.curate.replay import replay
for url, key in json.load(sys.stdin):
    print(json.dumps(replay(url, key).facts()), flush=True)
"""


def jobs(folder: Path, each: int) -> dict[str, Spec]:
    """Name of the family -> a job of at least ``each`` samples."""
    rows = folder / "rows.parquet"
    task_inputs.main(str(rows))
    found = {"text-to-image stable-diffusion (shipped)": shipped(folder, each)}
    variants = -(-each // 3)
    for family in FAMILIES:
        layout = FAMILY_LAYOUTS.get((family.task, family.name))
        if layout:
            found[f"{family.task} {family.name}"] = tiny(family, rows, folder, variants, layout)
    return found


def shipped(folder: Path, each: int) -> Spec:
    """The shipped model, with settings that differ from row to row."""
    count = -(-each // 2)
    table = {
        "prompt": [f"a red circle on a white background, number {n}" for n in range(count)],
        "guidance_scale": [1.0 + n % 7 for n in range(count)],
    }
    pq.write_table(pa.table(table), folder / "prompts.parquet")
    columns = {"guidance_scale": "guidance_scale"}
    return build(
        {
            "input": {"path": str(folder / "prompts.parquet"), "columns": columns},
            "variants": 2,
            "output": {"url": str(folder / "shipped"), "samples_per_shard": 16},
        }
    )


def tiny(family: Family, rows: Path, folder: Path, variants: int, layout: str) -> Spec:
    """A tiny model of the family, on drawn shapes."""
    model = BUILDERS[family.task, family.name](folder / f"{family.name}-model")
    spec = family_spec(family, model, rows, folder / family.name, layout=layout)
    return build(merge(spec.model_dump(mode="json"), {"variants": variants}))


def keys_of(url: str) -> list[str]:
    """The keys of all accepted samples."""
    files = sorted(Path(url, "data").glob("*.parquet"))
    return [
        key for file in files for key in pq.read_table(file, columns=["key"])["key"].to_pylist()
    ]


def elsewhere(
    python: str, chosen: Sequence[tuple[str, str]], env: dict[str, str]
) -> list[dict[str, Any]]:
    """The samples, replayed by another process."""
    done = subprocess.run(
        [python, "-c", CHILD],
        input=json.dumps(list(chosen)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def distances(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many are the same, and the PSNR in dB of the others."""
    others = sorted(one["psnr_db"] for one in found if one["psnr_db"] is not None)
    return {
        "replayed": len(found),
        "same": sum(one["same"] for one in found),
        "psnr_db": {"least": others[0], "median": others[len(others) // 2]} if others else None,
        "differences": {name: pair for one in found for name, pair in one["differences"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--other-python", help="an interpreter with another version of torch")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/replays.json")
    given = parser.parse_args()
    each = -(-given.samples // (len(FAMILY_LAYOUTS) + 1))
    draw = random.Random(0)
    families: dict[str, Any] = {}
    few: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in jobs(Path(folder), each).items():
            outcome = runner.run(spec, quiet=True)
            assert outcome.exit_code == 0, outcome.message
            url = Ledger(open_store(spec.output.url)).store.url
            chosen = draw.sample(keys_of(url), each)
            began = time.perf_counter()
            made = [replay(url, key) for key in chosen]
            seconds = round((time.perf_counter() - began) / each, 2)
            families[name] = {
                "layout": spec.resources.layout,
                "samples": outcome.accepted,
                "replayed": each,
                "same": sum(one.same for one in made),
                "psnr_db": [one.psnr_db for one in made if not one.same],
                "seconds_each": seconds,
            }
            print(name, families[name], flush=True)
            few += [(url, key) for key in chosen[:ELSEWHERE]]
        places = {"torch's kernels without vector instructions": (sys.executable, "default")}
        if given.other_python:
            places["another torch"] = (given.other_python, "")
        other = {}
        for place, (python, capability) in places.items():
            env = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
            other[place] = distances(elsewhere(python, few, env))
            print(place, other[place], flush=True)
    told = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "families": families,
        "elsewhere": other,
    }
    given.results.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
