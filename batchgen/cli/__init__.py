"""The command line: one module for each kind of command."""

from batchgen.cli import (
    catalogue,
    cluster,
    evaluate,
    extend,
    look,
    make,
    recipes,
    samples,
    scores,
    sets,
    sources,
    stores,
)
from batchgen.cli.options import FIELDS, main

__all__ = [
    "FIELDS",
    "catalogue",
    "cluster",
    "evaluate",
    "extend",
    "look",
    "main",
    "make",
    "recipes",
    "samples",
    "scores",
    "sets",
    "sources",
    "stores",
]
