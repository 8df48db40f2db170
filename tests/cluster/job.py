"""A complete job on three nodes, from bucket to bucket; one node is killed and another added.

    python -m tests.cluster.job --images 2000 --results FILE.json

It is handed over, watched, asked after and cancelled as a user would, from a shell that is no part
of the cluster, and gone on with there. Its images must be, byte for byte, those of a run on this
machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import configure, open_store
from tests.chaos.store import digests
from tests.cluster.nodes import Nodes, busy_worker, cluster, replicas, subnet, until
from tests.object_store.server import S3Server, make_bucket

BUCKET = "cluster"
COLOURS = ("red", "green", "blue", "white", "yellow")
PER_SHARD = 20


@dataclass
class Result:
    """What the job came to; every count after ``joined`` ought to be 0."""

    images: int
    shards: int
    redone: int
    seconds: float
    cancelled_after: int = 0  # shards committed when it was cancelled
    joined: bool = False  # the node that was added had a replica before the end
    lost: int = 0
    duplicated: int = 0
    wrong_pixels: int = 0
    problems: int = 0

    @property
    def clean(self) -> bool:
        bad = (self.lost, self.duplicated, self.wrong_pixels, self.problems)
        return self.joined and not any(bad)


@contextmanager
def store() -> Iterator[S3Server]:
    """A real S3 server that the nodes reach, and this process as well."""
    with tempfile.TemporaryDirectory(prefix="batchgen-s3-", ignore_cleanup_errors=True) as folder:
        server = S3Server(Path(folder) / "server", address=f"{subnet()}.1")
        before = {name: os.environ.get(name) for name in server.exports}
        server.start()
        try:
            os.environ.update(
                server.exports | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}
            )
            configure()
            make_bucket(S3Server(server.folder, port=server.port), BUCKET)
            yield server
        finally:
            server.stop()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            configure()


def write_prompts(images: int) -> str:
    texts = [f"a {COLOURS[row % len(COLOURS)]} circle number {row}" for row in range(images)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": texts}), sink, row_group_size=PER_SHARD)
    open_store(f"s3://{BUCKET}/in").put("prompts.parquet", sink.getvalue().to_pybytes())
    return f"s3://{BUCKET}/in"


def flags(source: str, output: str, steps: int) -> list[str]:
    return [
        *("--input", source, "--output", output, "--samples-per-shard", str(PER_SHARD)),
        *("--batch-size", "10", "--steps", str(steps)),
        *("--set", "resources.generate.max_replicas=2"),  # as many as there are cores here
    ]


def committed(output: str) -> int:
    return len(open_store(output).list("_batchgen/shards"))


def whole_job(
    nodes: Nodes, source: str, wanted: Counter[tuple[str, str]], images: int, steps: int
) -> Result:
    """The job with its losses; fails where a command does not do what it says.

    Args:
        nodes: the cluster.
        source: the prompts, one an image.
        wanted: what a run on this machine alone makes of them.
        images: how many.
        steps: of the scheduler.
    """
    output = f"s3://{BUCKET}/cluster"
    began = time.monotonic()
    # One replica to a node: what is lost with a node, the node that is added gives.
    words = [*flags(source, output, steps), "--set", "resources.generate.num_cpus=1.5"]
    done = nodes.batchgen("submit", *words, "--no-requirements", "--no-wait")
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    until("a shard is committed", lambda: committed(output), 180)
    for job in (name, output):
        asked = nodes.batchgen("status", job, "--address", nodes.address)
        assert asked.returncode == 3 and "cluster  running" in asked.stdout, asked
        assert "running: " in asked.stdout
    assert replicas(nodes.head, "Attempts")  # what is known of attempts outlives the workers
    until("the head's metrics tell of images", lambda: images_of(nodes, output), 30)
    cancelled = nodes.batchgen("cancel", output)
    assert cancelled.returncode == 0 and f"stopping {name}" in cancelled.stdout, cancelled
    followed = nodes.batchgen("logs", "--follow", name)
    assert followed.returncode == 3 and "committed shards are kept" in followed.stdout, followed
    until("its replicas have ended", lambda: not any(map(replicas, nodes.workers)))
    left = committed(output)
    with ThreadPoolExecutor() as shell:
        words = ["resume", output, "--address", nodes.address, "--no-requirements"]
        resuming = shell.submit(nodes.batchgen, *words, within_s=3600)
        lost = busy_worker(nodes)
        until("more is committed", lambda: committed(output) > left, 180)
        nodes.kill(lost)
        added = nodes.add()
        until("it has a replica", lambda: replicas(added) or resuming.done())
        joined = bool(replicas(added))
        resumed = resuming.result()
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{left} of them already committed" in resumed.stdout, resumed.stdout
    seconds = round(time.monotonic() - began, 1)
    result = Result(images, -(-images // PER_SHARD), 0, seconds, left, joined)
    return judged(result, wanted, output)


def images_of(nodes: Nodes, output: str) -> float:
    """Images accepted, as the head's metrics have it."""
    labels = (f'output="{output}"', 'outcome="accepted"')
    return sum(
        value
        for name, value in nodes.metrics().items()
        if name.startswith("ray_batchgen_images_total") and all(one in name for one in labels)
    )


def run_alone(words: list[str]) -> Counter[tuple[str, str]]:
    """The same job on this machine, outside the cluster: its keys and digests."""
    command = [sys.executable, "-m", "batchgen", "run", *words]
    subprocess.run(command, check=True, capture_output=True)
    return digests(words[words.index("--output") + 1])


def judged(result: Result, wanted: Counter[tuple[str, str]], output: str) -> Result:
    """Against the same job on this machine alone, and against what `verify` finds."""
    found = digests(output)
    keys = Counter(key for key, _ in found)
    ledger = Ledger(open_store(output))
    result.redone = sum(marker.attempt > 1 for marker in ledger.markers(range(result.shards)))
    result.lost = len({key for key, _ in wanted} - keys.keys())
    result.duplicated = found.total() - len(keys)
    result.wrong_pixels = len(found.keys() - wanted.keys())
    findings = verify(ledger)
    result.problems = len(findings.problems) + (findings.accepted != result.images)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then, too
    with store() as server, cluster(**server.exports) as nodes:
        source = write_prompts(options.images)
        wanted = run_alone(flags(source, f"s3://{BUCKET}/alone", options.steps))
        result = whole_job(nodes, source, wanted, options.images, options.steps)
    text = json.dumps(asdict(result), indent=1)
    print(text)
    if options.results is not None:
        options.results.write_text(text + "\n")
    return 0 if result.clean else 1


if __name__ == "__main__":
    sys.exit(main())
