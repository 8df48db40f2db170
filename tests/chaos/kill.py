"""Kills drivers, replicas and Ray at seeded moments, then compares with an undisturbed run.

    python -m tests.chaos.kill --kills 5 --shards 40 --seed 1 FOLDER

One run has its driver killed again and again and is resumed each time; another loses replicas'
processes and must go on by itself; a third loses first Ray's raylet, then its head, must say so and
is resumed. All must verify and hold, key for key, the bytes of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from tests.in_process import stream
from tests.outputs import digests_of

SAMPLES_PER_SHARD = 8
LONGEST_S = 300.0
IMPATIENT = """
from batchgen.cli import main
from batchgen.cluster import daemons
daemons.HEAD_GONE_FOR_S = 2.0
main()
"""
DAEMONS = {  # of Ray -> what is said when it is lost
    "raylet": "Ray's process on this machine, the raylet, has ended",
    "gcs_server": "has not answered for 2 s",
}


@dataclass(frozen=True)
class Tally:
    """The result of one disturbed run."""

    fault: str
    kills: int
    samples: int
    lost: int
    duplicated: int
    wrong_pixels: int
    shards_redone: int
    exit_codes: list[int]

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.wrong_pixels) and self.exit_codes[-1] == 0


def write_prompts(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": [f"a red star {row}" for row in range(rows)]}), path)


def settings_of(steps: int, replicas: int = 2) -> dict[str, Any]:
    return {
        "output.samples_per_shard": SAMPLES_PER_SHARD,
        "sampling.num_inference_steps": steps,
        "resources.batch_size": 4,
        "resources.generate.min_replicas": replicas,
        "resources.generate.max_replicas": replicas,
        "resources.generate.num_cpus": 0.5,
        "policy.shard_retries": 20,
    }


def command(source: Path, output: Path, steps: int, replicas: int = 2) -> list[str]:
    settings = settings_of(steps, replicas).items()
    sets = [word for name, value in settings for word in ("--set", f"{name}={value}")]
    flags = ["--input", str(source), "--output", str(output)]
    return [sys.executable, "-m", "batchgen", "run", *flags, *sets]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)


def markers(output: Path) -> int:
    return len(list((output / "_batchgen" / "shards").glob("*.json")))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """True once the condition holds; False if the process ended first."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("the run stands still")
        time.sleep(0.02)
    return True


def kill_drivers(
    source: Path, output: Path, kills: int, steps: int, dice: random.Random, replicas: int = 2
) -> Tally:
    """Kill the driver ``kills`` times, each time after a few more shards, and run it again."""
    words, codes, done = command(source, output, steps, replicas), [], 0
    log = output.with_suffix(".log")
    shards = rows_of(source) // SAMPLES_PER_SHARD
    while done < kills:
        process = start(words, log)
        goal = markers(output) + dice.randint(0, max(1, shards // (kills + 1)))
        if wait_until(lambda goal=goal: markers(output) >= goal, process):
            time.sleep(dice.random())
            process.kill()
            done += 1
        codes.append(process.wait(LONGEST_S))
        if codes[-1] == 0:
            break
    codes.append(start(words, log).wait(LONGEST_S))
    return tally_of("driver killed", done, output, source, codes)


def kill_replicas(source: Path, output: Path, kills: int, steps: int, dice: random.Random) -> Tally:
    """Kill one replica's process ``kills`` times in a single run."""
    process = start(command(source, output, steps), output.with_suffix(".log"))
    shards = rows_of(source) // SAMPLES_PER_SHARD
    done = 0
    for number in range(kills):
        goal = number * shards // (kills + 1) + dice.randint(0, 2)
        if not wait_until(lambda goal=goal: markers(output) >= goal, process):
            break
        if not wait_until(lambda: bool(replicas_of(process)), process):
            break
        time.sleep(dice.random() / 2)
        victims = replicas_of(process)
        if victims:
            dice.choice(victims).kill()
            done += 1
    return tally_of("replica killed", done, output, source, [process.wait(LONGEST_S)])


def kill_daemons(source: Path, output: Path, steps: int) -> Tally:
    """One after the other, each after one more shard; what is not said counts as exit code 5.

    One replica, because those of a lost raylet make a few more shards before they notice.
    """
    words, codes = command(source, output, steps, replicas=1), []
    log = output.with_suffix(".log")
    for daemon, said in DAEMONS.items():
        process = start([sys.executable, "-c", IMPATIENT, *words[3:]], log)
        goal = markers(output) + 1
        if wait_until(lambda goal=goal: markers(output) >= goal, process):
            family = psutil.Process(process.pid).children(recursive=True)
            next(one for one in family if one.name() == daemon).kill()
        code = process.wait(LONGEST_S)
        resume = f"{said}; committed shards are kept, continue with `batchgen resume"
        codes.append(code if resume in log.read_text() else 5)
    codes.append(start(words, log).wait(LONGEST_S))
    return tally_of("Ray killed", len(DAEMONS), output, source, codes)


def replicas_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The replicas' processes among the driver's descendants."""
    found = []
    try:
        for child in psutil.Process(driver.pid).children(recursive=True):
            try:
                if "MapWorker" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        pass
    return sorted(found, key=lambda process: process.pid)


def rows_of(source: Path) -> int:
    return int(pq.read_metadata(source).num_rows)


def tally_of(fault: str, kills: int, output: Path, source: Path, codes: list[int]) -> Tally:
    ledger = Ledger(open_store(str(output)))
    findings = verify(ledger)
    keys = digests_of(output)
    quiet = digests_of(output.parent / "quiet")
    redone = sum(m.attempt - 1 for m in ledger.markers(range(rows_of(source) // SAMPLES_PER_SHARD)))
    return Tally(
        fault=fault,
        kills=kills,
        samples=len(quiet),
        lost=len(quiet.keys() - keys.keys()) + findings.pending,
        duplicated=sum("more than once" in problem for problem in findings.problems),
        wrong_pixels=sum(keys[key] != quiet[key] for key in keys.keys() & quiet.keys()),
        shards_redone=redone,
        exit_codes=codes if findings.ok else [*codes, 4],
    )


def quiet_run(folder: Path, shards: int, steps: int) -> Path:
    """The stream in this process, with which runs are compared; returns its input."""
    source = folder / "prompts.parquet"
    write_prompts(source, shards * SAMPLES_PER_SHARD)
    places = {"input": {"path": str(source)}, "output": {"url": str(folder / "quiet")}}
    stream(build(merge(places, settings_of(steps))))
    return source


def chaos(folder: Path, kills: int, shards: int, steps: int, seed: int) -> list[Tally]:
    """An undisturbed run, and runs in which drivers, replicas or Ray are killed."""
    source = quiet_run(folder, shards, steps)
    dice = random.Random(seed)
    return [
        kill_drivers(source, folder / "drivers", kills, steps, dice),
        kill_replicas(source, folder / "replicas", kills, steps, dice),
        kill_daemons(source, folder / "daemons", steps),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tallies = chaos(options.folder, options.kills, options.shards, options.steps, options.seed)
    for tally in tallies:
        print(json.dumps(asdict(tally)))
    return 0 if all(tally.clean for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
