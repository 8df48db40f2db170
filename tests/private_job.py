"""Starts Ray as a local run does, prints facts about it, and ends in the way of its argument.

    python -m tests.private_job ENDING     # return, raise, wait or signal

`wait` reads standard input until it is closed: whoever looks at the processes kills it meanwhile.
`signal` sends itself SIGTERM and SIGINT once Ray has ended, and tells on stdout what it got.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import ray

from batchgen.cluster.join import cluster
from batchgen.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Writer:
    """An actor, which makes files as a stage does."""

    def write(self, path: str) -> int:
        with open(path, "w") as file:
            file.write("an image")
        return os.getpid()


def main(ending: str, path: str) -> None:
    got: list[int] = []
    if ending == "signal":
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: got.append(number))
    with cluster(None):
        writer = ray.remote(Writer).remote()
        facts = {
            "actor": ray.get(writer.write.remote(path)),
            "temporary": ray._private.worker._global_node.temp_dir,
            "address": ray.get_runtime_context().gcs_address,
        }
        print(json.dumps(facts), flush=True)
        if ending == "wait":
            sys.stdin.read()
        if ending == "raise":
            raise Interrupted("Ray has failed")
    if ending == "signal":
        for number in SIGNALS:
            signal.raise_signal(number)
        print(json.dumps(got), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
