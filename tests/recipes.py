"""Expands recipes in memory, for the tests of recipes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from batchgen.recipes.expand import Expansion
from batchgen.recipes.recipe import build_recipe

Row = dict[str, Any]


def expansion(tree: Mapping[str, Any], **given: Any) -> Expansion:
    """A recipe that is ready to make samples."""
    return Expansion(build_recipe(tree), **given)


def rows_of(
    tree: Mapping[str, Any], variants: tuple[int, int] | None = None, **given: Any
) -> dict[str, Row]:
    """Key -> sample, in the order in which they are made."""
    with closing(expansion(tree, **given)) as made:
        rows = [row for table in made.tables(variants) for row in table.to_pylist()]
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows), "a key occurs twice"
    return found


def reasons_of(tree: Mapping[str, Any], **given: Any) -> dict[str, int]:
    """Reason -> number of rejected samples."""
    with closing(expansion(tree, **given)) as made:
        list(made.tables())
        return dict(made.rejected)
