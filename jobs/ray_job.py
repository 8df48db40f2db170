"""What `batchgen submit` starts on a cluster's head: the command line, with its arguments."""

from __future__ import annotations

import sys

from batchgen.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])
