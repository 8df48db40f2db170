"""Complete runs on a real S3 server, with seeded faults of the store and killed processes.

    python -m tests.chaos.store --runs 100 --seed 1 --results FILE.jsonl FOLDER

Every run goes from s3:// to s3:// through a proxy that fails by rules; its driver, a replica or
the gateway is killed as well. What ended early is run again until it is complete. Then it must
hold, key for key, the bytes of a run that nobody disturbed, and after `clean` nothing unfinished.
Results are appended run by run, and runs that stand there already are left out: stopped, the same
command goes on.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output import clean
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import configure, open_store, unfinished_uploads
from tests.chaos.kill import replicas_of
from tests.object_store.proxy import FaultProxy, Rule, Seen
from tests.object_store.server import S3Server, make_bucket

BUCKET = "chaos"
ROWS, VARIANTS, PER_SHARD = 12, 2, 4
BALLAST_BYTES = 6 << 20  # a column of noise, so that a shard is large enough for parts
PART_BYTES = 5 << 20
MOST_TRIES = 10
LEAST_FAULTS = 3
LONGEST_S = 600.0
STORE_FAULTS: dict[str, dict[str, Any]] = {
    "slow-down": {"kind": "error", "times": 5},
    "internal-error": {"kind": "error", "status": 500, "code": "InternalError", "times": 3},
    "reset": {"kind": "reset", "times": 3},
    "cut": {"kind": "cut", "method": "GET", "times": 3},
    "cut-body": {"kind": "cut-body", "method": "PUT", "times": 2},
    "lost-put": {"kind": "lost", "method": "PUT", "times": 2},
    "lost-marker": {"kind": "lost", "method": "PUT", "target": "_batchgen/shards", "times": 1},
    "lost-completion": {"kind": "lost", "method": "POST", "target": "uploadId", "times": 1},
    "lost-part": {"kind": "lost", "method": "PUT", "target": "partNumber", "times": 1},
    "latency": {"kind": "latency", "seconds": 0.5, "times": 20},
    "hang": {"kind": "hang", "seconds": 30, "times": 1},
}
SECOND_PART = "partNumber=2"
KILLS = ("driver killed", "replica killed", "gateway killed")


@dataclass
class Run:
    """The result of one disturbed run."""

    seed: int
    planned: int
    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    wrong_pixels: int = 0
    half_visible: int = 0
    orphans_before_clean: int = 0
    orphans: int = 0
    shards_redone: int = 0
    bytes_resent: int = 0
    exit_codes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        bad = (self.lost, self.duplicated, self.wrong_pixels, self.half_visible, self.orphans)
        enough = sum(self.faults.values()) >= LEAST_FAULTS
        # Faults that pass end no run: only a kill does.
        ended = self.exit_codes[-1] == 0 and set(self.exit_codes[:-1]) <= {-9}
        return not any(bad) and ended and not self.problems and enough


def write_input(path: Path) -> None:
    noise = random.Random(0)
    rows = {
        "prompt": [f"a red star {row}" for row in range(ROWS)],
        "ballast": [noise.randbytes(BALLAST_BYTES) for _ in range(ROWS)],
    }
    pq.write_table(pa.table(rows), path, row_group_size=3, compression="NONE")


def command(source: str, output: str) -> list[str]:
    settings = {
        "output.samples_per_shard": PER_SHARD,
        "sampling.num_inference_steps": 4,
        "resources.batch_size": 4,
        "resources.generate": "{min_replicas: 1, max_replicas: 1}",
        "policy.shard_retries": 20,
        "storage.part_bytes": PART_BYTES,
        "storage.read_timeout_s": 5,
        "variants": VARIANTS,
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "batchgen", "run", "--input", source, "--output", output, *sets]


def digests(output: str) -> Counter[tuple[str, str]]:
    """(key, sha256) of every sample in ``data/``, with how often it stands there."""
    store = open_store(output)
    found: Counter[tuple[str, str]] = Counter()
    for name in store.find("data"):
        with store.open(f"data/{name}") as file:
            table = pq.ParquetFile(file).read(columns=["key", "sha256"], use_threads=False)
        found.update(zip(*(table.column(i).to_pylist() for i in (0, 1)), strict=True))
    return found


class Disturbance:
    """Three faults or more for one run, drawn by its seed.

    A kill comes after some number of requests or, every second time, while the second part of a
    large upload is held up, so that it tears the upload.
    """

    def __init__(self, seed: int, server: S3Server, proxy: FaultProxy) -> None:
        self.dice = random.Random(seed)
        self.server, self.proxy = server, proxy
        self.done: Counter[str] = Counter()
        self.kills = {
            kind: self.dice.randint(10, 110)
            for kind in self.dice.sample(KILLS, self.dice.randint(1, 2))
        }
        self.torn = self.dice.random() < 0.5
        held = Rule("latency", target=SECOND_PART, seconds=2, times=1, skip=self.dice.randint(0, 3))
        self.held = held
        self.names = {
            name: self._rule(name)
            for name in self.dice.sample(sorted(STORE_FAULTS), self.dice.randint(3, 5))
        }
        proxy.rules(*([held] if self.torn else []), *self.names.values())

    def _rule(self, name: str) -> Rule:
        narrow = "target" in STORE_FAULTS[name]
        skip = self.dice.randint(0, 1) if narrow else self.dice.randint(3, 30)
        return Rule(**{**STORE_FAULTS[name], "skip": skip})

    def _is_due(self, at: int) -> bool:
        return self.held.times == 0 if self.torn else len(self.proxy.log) >= at

    def befallen(self) -> dict[str, int]:
        """Number of times that each store fault and each kill happened."""
        found = {
            name: STORE_FAULTS[name]["times"] - (rule.times or 0)
            for name, rule in self.names.items()
        }
        return {name: count for name, count in {**found, **self.done}.items() if count}

    @contextmanager
    def watching(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Inside, the due kills are carried out, each once."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                for kind, at in list(self.kills.items()):
                    if self._is_due(at) and self._kill(kind, process):
                        del self.kills[kind]
                        self.done[kind] += 1

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _kill(self, kind: str, process: subprocess.Popen[bytes]) -> bool:
        if kind == "driver killed":
            alive = process.poll() is None
            process.kill()
            return alive
        if kind == "replica killed":
            victims = replicas_of(process)
            if victims:
                self.dice.choice(victims).kill()
            return bool(victims)
        self.server.kill_gateway()
        time.sleep(self.dice.uniform(1, 6))
        self.server.start_gateway()
        return True


def disturbed_run(
    seed: int, server: S3Server, source: str, quiet: Counter[tuple[str, str]], log: Path
) -> Run:
    """Run until the output is complete, and check what is in storage."""
    output = f"s3://{BUCKET}/run-{seed}"
    run = Run(seed, ROWS * VARIANTS)
    began = time.monotonic()
    with FaultProxy(server.port, seed) as proxy:
        trouble = Disturbance(seed, server, proxy)
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        begins = []
        while len(run.exit_codes) < MOST_TRIES:
            begins.append(len(proxy.log))
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command(source, output),
                    stdout=file,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                )
            with trouble.watching(process):
                run.exit_codes.append(process.wait(LONGEST_S))
            if run.exit_codes[-1] not in (3, -9):
                break
        run.faults = trouble.befallen()
        count_resent(run, proxy.log, begins, output)
    run.seconds = round(time.monotonic() - began, 1)
    judge(run, output, quiet)
    fs = open_store(output)
    fs.fs.rm(fs.root, recursive=True)
    return run


def count_resent(run: Run, log: list[Seen], begins: list[int], output: str) -> None:
    """Shards that a later process began to write again, and bytes sent beyond what is there."""
    path = output.removeprefix("s3:/") + "/data/"
    writers: set[tuple[str, int]] = set()
    sent = 0
    for place, seen in enumerate(log):
        name = seen.target.partition("?")[0]
        if name.startswith(path) and seen.method == "PUT":
            sent += seen.body_bytes
            writers.add((name, bisect.bisect(begins, place)))
    run.shards_redone = len(writers) - len({name for name, _ in writers})
    run.bytes_resent = max(0, sent - sum(open_store(output).find("data").values()))


def judge(run: Run, output: str, quiet: Counter[tuple[str, str]]) -> None:
    ledger = Ledger(open_store(output))
    findings = verify(ledger)
    run.problems = findings.problems[:5]
    run.half_visible = sum("belongs to no" in problem for problem in findings.problems)
    found = digests(output)
    keys, wanted = {key for key, _ in found}, {key for key, _ in quiet}
    run.lost = len(wanted - keys)
    run.duplicated = sum(count - 1 for count in found.values())
    run.wrong_pixels = len(found.keys() - quiet.keys())
    run.orphans_before_clean = len(unfinished_uploads(ledger.store))
    clean.clean(ledger)
    run.orphans = len(unfinished_uploads(ledger.store))


def chaos(folder: Path, seeds: list[int], results: Path | None = None) -> list[Run]:
    """An undisturbed run, then one disturbed run for each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    server = S3Server(folder / f"server-{os.getpid()}")
    server.start()
    try:
        os.environ.update(server.exports)
        configure()
        make_bucket(server, BUCKET)
        write_input(folder / "in.parquet")
        open_store(f"s3://{BUCKET}/in").put("in.parquet", (folder / "in.parquet").read_bytes())
        source = f"s3://{BUCKET}/in"
        subprocess.run(command(source, f"s3://{BUCKET}/quiet"), check=True, capture_output=True)
        quiet = digests(f"s3://{BUCKET}/quiet")
        runs = []
        for seed in seeds:
            runs.append(disturbed_run(seed, server, source, quiet, folder / "chaos.log"))
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
        return runs
    finally:
        server.stop()


def table(runs: list[Run]) -> str:
    faults: Counter[str] = Counter()
    for run in runs:
        faults.update(run.faults)
    lines = [f"{'fault':<18}{'times':>6}"]
    lines += [f"{name:<18}{count:>6}" for name, count in sorted(faults.items())]
    sums = {
        name: sum(getattr(run, name) for run in runs)
        for name in (
            *("planned", "lost", "duplicated", "wrong_pixels", "half_visible"),
            *("orphans_before_clean", "orphans", "shards_redone", "bytes_resent"),
        )
    }
    lines += ["", f"runs {len(runs)}, not clean {sum(not run.clean for run in runs)}"]
    lines += [f"{name:<22}{value:>14,}" for name, value in sums.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped on the way out
    before: list[Run] = []
    if options.results is not None and options.results.exists():
        before = [Run(**json.loads(line)) for line in options.results.read_text().splitlines()]
    done = {run.seed for run in before}
    seeds = [one for one in range(options.seed, options.seed + options.runs) if one not in done]
    runs = [*before, *(chaos(options.folder, seeds, options.results) if seeds else [])]
    print(table(runs))
    for run in runs:
        if not run.clean:
            print(json.dumps(asdict(run)))
    return 0 if all(run.clean for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
