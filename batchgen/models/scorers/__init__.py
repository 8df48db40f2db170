"""Finds, checks and loads scorers by name: from the spec's field ``score`` to ready scorers."""

from batchgen.models.scorers.load import check_scorers, load_scorers

__all__ = ["check_scorers", "load_scorers"]
