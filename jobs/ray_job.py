"""What `batchgen submit` starts on the cluster's head: `batchgen run` with the spec beside it."""

from __future__ import annotations

import sys

from batchgen.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
