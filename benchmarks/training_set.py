"""From 10 real digits of each class to a training set, and whether it helps: every step, recorded.

    python benchmarks/training_set.py [--folder out/training] [--draws 10] [--steps eval]

Runs the commands of `jobs/training_set.yaml` one after the other, each in a process of its own:
data and probe, generation with scores and quota, leak check, selections, mix, eval. Writes
``results/training_set.json`` with the commands, what the quota and the selections kept, and the
figures of eval, whatever they show. `--steps` runs only the named steps, on what the others left in
the folder; what these printed is in its ``steps.json``. The folder must not exist before all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS_KEPT = "steps.json"  # in the folder: what each step printed, also of an earlier call
SELECTIONS, EVALUATIONS = "_batchgen/selections", "_batchgen/evaluations"
FOLDER = "out/training"  # of jobs/training_set.yaml
RESULT = ROOT / "benchmarks" / "results" / "training_set.json"
SAW = "the 1,297 labelled training digits and 48,000 drawn shapes; never the 500 held-out digits"
PROTOCOL = {
    "generator": f"digits-shapes, trained on {SAW}",
    "probe": "a small ResNet, trained on the 100 real images and nothing else",
    "extractor": "efficientnet-lite0, trained on ImageNet: no digits",
    "real": "10 images of each class, of the generator's training set",
    "held_out": "500 images that neither generator, probe nor choice of hyper-parameters read",
    "open_set": "The generator has seen 1,297 labelled digits, the classifier 30 to 100. A gain is "
    "transfer from a labelled pool, as with any pretrained generator, and not free information. "
    "With a generator that saw only the classifier's own images the gain was about zero.",
    "ceiling": "arm pool: 1,097 labelled real images, the 100 among them",
    "made_from": "The synthetic images were made from all 100 real ones, also where an arm has "
    "fewer of these",
}


def commands(folder: str, draws: int) -> dict[str, list[list[str]]]:
    """Step -> its commands."""
    images, test = f"{folder}/images", f"{folder}/test.parquet"
    batchgen = [sys.executable, "-m", "batchgen"]
    sets = [f"{folder}/real.parquet", images, "--held-out", test]
    sets += ["--validation", f"{folder}/validation.parquet", "--pool", f"{folder}/pool.parquet"]
    how = ["--draws", str(draws), "--side", "16", "--steps", "100", "--generator-saw", SAW]
    agreeing, every = [*sets], [*sets]
    agreeing[1], every[1] = f"{images}:kept", f"{images}:all"
    pool = f"{folder}/pool.parquet"
    against = ["--against", test, "--against", f"{folder}/validation.parquet"]
    kept = ["--where", "class_agrees and not is_leak", "--top", "100", "--by", "seed"]
    mixed = ["--real", f"{folder}/real.parquet", "--synthetic", f"{images}:kept"]
    return {
        "data": [[sys.executable, "jobs/training_set.py", folder]],
        "run": [[*batchgen, "run", "jobs/training_set.yaml", *_here(folder)]],
        "verify": [[*batchgen, "verify", images]],
        "copies": [[*batchgen, "copies", images, *against, "--training", pool]],
        "select": [
            [*batchgen, "select", images, "--name", "kept", *kept, "--per", "label"],
            [*batchgen, "select", images, "--name", "all", "--where", "not is_leak"],
        ],
        "mix": [[*batchgen, "mix", f"{folder}/mix", *mixed, "--held-out", test]],
        "eval": [
            [*batchgen, "eval", *agreeing, *how, "--name", "kept"],
            [*batchgen, "eval", *every, *how, "--name", "all"],
        ],
    }


def _here(folder: str) -> list[str]:
    """Settings of the job for another folder than its own."""
    if folder == FOLDER:
        return []
    places = [f"input.path={folder}/real.parquet", f"output.url={folder}/images"]
    places.append(f"score=[phash, classifier={folder}/probe]")
    return [word for place in places for word in ("--set", place)]


def run(command: list[str]) -> dict[str, Any]:
    """Run a command; its seconds and the last lines that it printed."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    seconds = round(time.monotonic() - began, 1)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.strip().splitlines()
    print(f"{seconds:7.1f} s  {' '.join(command[2:6])}: {lines[-1] if lines else ''}", flush=True)
    said = [] if "eval" in command else [line.replace(f"{ROOT}/", "") for line in lines[-30:]]
    shown = ["batchgen" if word == "-m" else word for word in command[1:] if word != "batchgen"]
    return {"command": " ".join(shown), "seconds": seconds, "said": said}


def kept(folder: Path) -> dict[str, str]:
    """What the quota and the selections kept, as the output's records say."""
    from batchgen.output.ledger import Ledger
    from batchgen.output.quota_record import quota_of
    from batchgen.storage import open_store

    record = quota_of(Ledger(open_store(str(folder / "images"))))
    notes = []
    for path in sorted((folder / "images" / SELECTIONS).glob("*.json")):
        told = json.loads(path.read_text())
        query = told["query"]
        where = f"where {query['where']}" if query.get("where") else "all"
        top = f", at most {query['top']} of each {', '.join(query['per'])}" if query["top"] else ""
        notes.append(
            f"'{told['name']}': {told['selected']:,} of {told['samples']:,} candidates, "
            f"{where}{top}"
        )
    return {"quota": record.message if record else "none", "note": "; ".join(notes)}


def figures(folder: Path) -> dict[str, Any]:
    """What the evaluations found, by their names."""
    found = {}
    for path in sorted((folder / "images" / EVALUATIONS).glob("*.json")):
        told = json.loads(path.read_text())
        found[path.stem] = {
            name: told[name]
            for name in ("primary_endpoint", "verdict", "helps", "sets", "hyper_parameters")
        }
        found[path.stem]["benefit"] = told["benefit"]
        found[path.stem]["quality"] = told["quality"]
        found[path.stem]["notes"] = told["notes"]
        found[path.stem]["protocol"] = told["protocol"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=FOLDER)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--steps", help="names with commas; default: all")
    given = parser.parse_args()
    steps = commands(given.folder, given.draws)
    wanted = given.steps.split(",") if given.steps else list(steps)
    unknown = sorted(set(wanted) - steps.keys())
    if unknown:
        raise SystemExit(f"--steps: unknown {unknown[0]!r}; allowed: {', '.join(steps)}")
    folder = ROOT / given.folder
    told = folder / STEPS_KEPT
    if "data" in wanted and (folder / "images").exists():
        raise SystemExit(f"{folder} has images of an earlier call; remove it, or name --steps")
    folder.mkdir(parents=True, exist_ok=True)
    ran = json.loads(told.read_text()) if told.exists() else {}
    for name in (one for one in steps if one in wanted):
        ran[name] = [run(one) for one in steps[name]]
        told.write_text(json.dumps(ran, indent=1, ensure_ascii=False) + "\n")
    result = {
        "measured": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "diffusers")},
        "protocol": PROTOCOL,
        "steps": {name: ran[name] for name in steps if name in ran},
        **kept(folder),
        "evaluations": figures(folder),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name, one in result["evaluations"].items():
        print(f"{name}: {one['verdict']}")


if __name__ == "__main__":
    main()
