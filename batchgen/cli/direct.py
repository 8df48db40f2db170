"""Prepares the input of a command's spec: a source that is not Parquet is imported before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import click

from batchgen.cli.echo import echo

if TYPE_CHECKING:
    from batchgen.importing.direct import How
    from batchgen.spec.spec import Spec

# keep: the import is kept in the output, for a run; look: in a temporary folder; submit: as keep,
# but inputs at URLs are left to the cluster if the spec is complete without them, since this
# machine may have no access to them.
Reads = Literal["keep", "look", "submit"]
_GIVEN = "batchgen.input"


def prepared(
    tree: dict[str, Any], reads: Reads, given: Mapping[str, Any], held: ExitStack
) -> dict[str, Any]:
    """The tree of a spec with an input that is Parquet.

    Args:
        given: the other options of the command: ``dry_run``, ``overwrite``, ``as_json``.
        held: removes temporary folders when the command ends.
    """
    path = tree["input"].get("path") if isinstance(tree.get("input"), dict) else None
    if not isinstance(path, str) or (reads == "submit" and "://" in path and _is_complete(tree)):
        return tree
    from batchgen.importing.direct import sourced

    keep = reads != "look" and not given.get("dry_run")
    made = sourced(tree, _how(keep, given, held))
    if made["input"]["path"] != path:
        click.get_current_context().meta[_GIVEN] = made["input"]["path"], path
    return made


def prepared_for_recipe(
    tree: dict[str, Any], given: Mapping[str, Any], held: ExitStack
) -> dict[str, Any]:
    """The tree with source rows that a recipe can read.

    The import is kept in the output also by `plan`, as the rows of the recipe are.
    """
    from batchgen.importing.direct import as_parquet

    return as_parquet(tree, _how(True, given, held))


def _how(keep: bool, given: Mapping[str, Any], held: ExitStack) -> How:
    """How a command imports: quietly if it prints JSON."""
    from batchgen.cli.progress_lines import ImportLines
    from batchgen.importing.direct import How

    quiet = bool(given.get("as_json"))
    return How(
        keep=keep,
        overwrite=bool(given.get("overwrite")),
        held=held,
        say=lambda text: None if quiet else echo(text, err=True),
        tell=(lambda summary: None) if quiet else ImportLines(),
        ready=_refuse_unless_free,
    )


def _is_complete(tree: dict[str, Any]) -> bool:
    """Whether the spec names all columns that it needs."""
    from batchgen.errors import SpecError
    from batchgen.spec.build import build

    try:
        build(tree)
    except SpecError:
        return False
    return True


def given_input(spec: Spec) -> dict[str, Any]:
    """The section ``input`` as the user gave it, if its source was imported for this command."""
    context = click.get_current_context(silent=True)
    imported, path = context.meta.get(_GIVEN, ("", "")) if context else ("", "")
    if not imported or spec.input.path != imported:
        return {}
    return {"input": spec.input.model_copy(update={"path": path, "uri_roots": None})}


def _refuse_unless_free(output: str) -> None:
    """Refuse an output folder with files of others, before an import is written there."""
    from batchgen.output.holdings import refuse_unless_free
    from batchgen.output.ledger import Ledger
    from batchgen.storage import open_store

    refuse_unless_free(Ledger(open_store(output)))
