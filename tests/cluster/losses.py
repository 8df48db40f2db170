"""Parts of a cluster are lost during a job; its bytes must equal those of an undisturbed run.

python -m tests.cluster.losses --results FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.chaos.store import digests
from tests.cluster import pressure
from tests.cluster.job import BUCKET, committed, flags, run_alone, store, write_prompts
from tests.cluster.nodes import Node, Nodes, busy_worker, cluster, replicas, until

IMAGES, STEPS = 320, 20
REDONE = re.compile(r"shard \d+ committed at attempt (\d+)")
# Nothing but what is the shards' own fault may be charged to them.
NO_RETRIES = ("policy.shard_retries=0",)
# A node has room for one: what is lost with a node, the node that is added gives.
ONE_A_NODE = ("resources.generate.num_cpus=1.5",)


@dataclass
class Loss:
    """What a loss cost; every count but ``redone`` ought to be 0.

    ``redone`` are the attempts at shards beyond each one's first, as the runs tell of them. What a
    driver had in work when it was killed is begun as a first attempt by the next, and not in it.
    """

    name: str
    seconds: float
    redone: int
    failed_shards: int
    lost: int
    duplicated: int
    wrong_pixels: int
    problems: int

    @property
    def clean(self) -> bool:
        bad = (self.failed_shards, self.lost, self.duplicated, self.wrong_pixels, self.problems)
        return not any(bad)


def replica_killed(nodes: Nodes) -> None:
    os.kill(replicas(busy_worker(nodes), at_work=True)[0], signal.SIGKILL)


def node_killed(nodes: Nodes) -> None:
    nodes.kill(busy_worker(nodes))
    nodes.add()


def node_cut_off(nodes: Nodes) -> None:
    """The node is given up and replaced; when it comes back, it first writes what it had."""
    node, other = _given_up(nodes)
    until("another has its work", lambda: replicas(other, at_work=True) or not drivers(nodes))
    _restored(nodes, node)


def node_cut_off_to_the_end(nodes: Nodes) -> None:
    """Its shard was generated elsewhere when it writes its own result, after the job."""
    node, _ = _given_up(nodes)
    until("the job is over", lambda: not drivers(nodes))
    _restored(nodes, node)


def _given_up(nodes: Nodes) -> tuple[Node, Node]:
    node = busy_worker(nodes)
    node.cut()
    other = nodes.add()
    until("it is given up", lambda: nodes.states().get(node.address) == "DEAD")
    return node, other


def _restored(nodes: Nodes, node: Node) -> None:
    """The node's Ray ends as soon as it learns that it was given up."""
    node.restore()
    until("its Ray has ended", lambda: node.process.poll() is not None)
    nodes.kill(node)


def node_drained(nodes: Nodes) -> None:
    """As a cloud reclaims a spot instance: a notice, and soon after that the end."""
    node = busy_worker(nodes)
    nodes.drain(node, seconds=1)
    nodes.add()
    until("it has ended", lambda: nodes.states().get(node.address) == "DEAD")
    nodes.kill(node)


def replica_and_driver_killed(nodes: Nodes) -> None:
    replica_killed(nodes)
    (driver,) = drivers(nodes)
    os.kill(driver, signal.SIGKILL)


def drivers(nodes: Nodes) -> list[int]:
    """The Python process of the job, not the shell that Ray starts it in; none when it is over."""
    found = []
    for pid in nodes.head.pids():
        try:
            program, *words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:  # it has ended since
            continue
        if "python" in program and any(word.endswith("ray_job.py") for word in words):
            found.append(pid)
    return found


@dataclass(frozen=True)
class Case:
    """What is lost, what the cluster needs for that beforehand, and what the job is told."""

    lose: Callable[[Nodes], None]
    settings: tuple[str, ...] = NO_RETRIES
    prepare: Callable[[Nodes], None] = lambda nodes: None


SHORT = {
    "node cut off and back": Case(node_cut_off, (*NO_RETRIES, *ONE_A_NODE)),
    "node drained": Case(node_drained),
    "replica and driver killed": Case(replica_and_driver_killed, settings=()),
}
LOSSES = {
    **SHORT,
    "node cut off to the end": Case(node_cut_off_to_the_end, (*NO_RETRIES, *ONE_A_NODE)),
    "replica killed": Case(replica_killed, settings=()),
    "node killed": Case(node_killed),
    "worker out of memory": Case(
        pressure.eat_memory, ("resources.generate.resources.watchful=1",), pressure.add_watchful
    ),
    "object stores full": Case(
        pressure.fill_object_stores, (*NO_RETRIES, "resources.layout=staged")
    ),
    "GCS restarted": Case(pressure.restart_gcs),
}


def job_with(nodes: Nodes, name: str, quiet: Counter[tuple[str, str]], source: str) -> Loss:
    """One job in which this is lost, once, after its first shard."""
    case = LOSSES[name]
    output = f"s3://{BUCKET}/{name.replace(' ', '-')}"
    began = time.monotonic()
    case.prepare(nodes)
    settings = [word for setting in case.settings for word in ("--set", setting)]
    words = [*flags(source, output, STEPS), *settings, "--no-requirements", "--no-wait"]
    done = nodes.batchgen("submit", *words)
    assert done.returncode == 0, done.stderr
    until("a shard is committed", lambda: committed(output), 180)
    case.lose(nodes)
    followed = nodes.batchgen("logs", "--follow", done.stdout.strip())
    if "driver" in name:
        assert followed.returncode == 3, followed
        again = ("resume", output, "--address", nodes.address, "--no-requirements")
        followed = nodes.batchgen(*again)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    ledger = Ledger(open_store(output))
    states = ledger.states(ledger.require_plan())
    findings, found = verify(ledger), digests(output)
    keys = {key for key, _ in found}
    return Loss(
        name=name,
        seconds=round(time.monotonic() - began, 1),
        redone=sum(int(at) - 1 for at in REDONE.findall(ledger.logs())),
        failed_shards=len(states.failed),
        lost=len({key for key, _ in quiet} - keys),
        duplicated=found.total() - len(keys),
        wrong_pixels=len(found.keys() - quiet.keys()),
        problems=len(findings.problems) + (findings.accepted != IMAGES),
    )


def quiet_run() -> tuple[str, Counter[tuple[str, str]]]:
    """The input, and what a run on this machine alone makes of it."""
    source = write_prompts(IMAGES)
    return source, run_alone(flags(source, f"s3://{BUCKET}/quiet", STEPS))


def table(losses: list[Loss]) -> str:
    lines = [f"{'lost':<24}{'redone':>8}{'failed':>8}{'lost':>6}{'twice':>7}{'wrong':>7}{'s':>8}"]
    lines += [
        f"{one.name:<24}{one.redone:>8}{one.failed_shards:>8}{one.lost:>6}{one.duplicated:>7}"
        f"{one.wrong_pixels:>7}{one.seconds:>8}"
        for one in losses
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LOSSES))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then, too
    losses = []
    with store() as server:
        source, quiet = quiet_run()
        for name in options.names or LOSSES:
            with pressure.redis() as redis, cluster(redis=redis, **server.exports) as nodes:
                losses.append(job_with(nodes, name, quiet, source))
            print(table(losses[-1:]).splitlines()[-1], flush=True)
    print(table(losses))
    if options.results is not None:
        options.results.write_text(json.dumps([asdict(one) for one in losses], indent=1) + "\n")
    return 0 if all(one.clean for one in losses) else 1


if __name__ == "__main__":
    sys.exit(main())
