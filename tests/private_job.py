"""Starts Ray as a local run does, tells on stdout what it is, and ends as its argument says.

    python -m tests.private_job ENDING     # return, raise or wait

`waits` reads standard input until it is closed: whoever looks at the processes kills it meanwhile.
"""

from __future__ import annotations

import json
import os
import sys

import ray

from batchgen import engine
from batchgen.errors import Interrupted


class Writer:
    """An actor, which makes files as a stage does."""

    def write(self, path: str) -> int:
        with open(path, "w") as file:
            file.write("an image")
        return os.getpid()


def main(ending: str, path: str) -> None:
    with engine.cluster(None):
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


if __name__ == "__main__":
    main(*sys.argv[1:])
