"""What `batchgen submit` and `resume` start on a cluster's head: `batchgen` with these arguments."""

from __future__ import annotations

import sys

from batchgen.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])
