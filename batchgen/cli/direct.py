"""Prepares the input of a command's spec: a source that is not Parquet is imported before."""

from __future__ import annotations

import tempfile
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
_GIVEN, _RECIPE = "batchgen.input", "batchgen.recipe"


def prepared(
    tree: dict[str, Any], reads: Reads, given: Mapping[str, Any], held: ExitStack
) -> dict[str, Any]:
    """The tree of a spec with an input that is Parquet: first imported, then expanded by a recipe.

    Args:
        given: the other options of the command: ``dry_run``, ``overwrite``, ``as_json``.
        held: removes temporary folders when the command ends.
    """
    keep = reads != "look" and not given.get("dry_run")
    quiet = bool(given.get("as_json"))
    if {"preset", "recipe"} & tree.keys():
        from batchgen.recipes.presets import with_preset

        tree = with_preset(tree)
    path = tree["input"].get("path") if isinstance(tree.get("input"), dict) else None
    if "recipe" in tree:
        from batchgen.importing.direct import as_parquet

        _require_output(tree)
        keep = keep or _asks(tree["recipe"])
        rows = as_parquet(tree, _how(keep, given, held))
        return _expanded(rows, path, keep, quiet, held)
    if not isinstance(path, str) or (reads == "submit" and "://" in path and _is_complete(tree)):
        return tree
    from batchgen.importing.direct import sourced

    made = sourced(tree, _how(keep, given, held))
    if made["input"]["path"] != path:
        click.get_current_context().meta[_GIVEN] = made["input"]["path"], path
    return made


def _require_output(tree: Mapping[str, Any]) -> str:
    """The output of the spec, beside whose records the rows are kept."""
    from batchgen.spec.faults import NEEDED, missing

    place = tree.get("output")
    output = place.get("url") if isinstance(place, dict) else place
    if not isinstance(output, str) or not output:
        raise missing("output", NEEDED["output"])
    return output


def _asks(recipe: Any) -> bool:
    """Whether a recipe asks a language model: its answers cost money, so they are always kept."""
    if isinstance(recipe, Mapping):
        return "ask" in recipe or any(_asks(one) for one in recipe.values())
    return False


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


def _expanded(
    tree: dict[str, Any], given_path: Any, keep: bool, quiet: bool, held: ExitStack
) -> dict[str, Any]:
    """The tree with the rows of its recipe as its input; ``given_path`` is what the user gave."""
    from batchgen.recipes.job import expanded_with_report, shown
    from batchgen.storage import configure

    output = _require_output(tree)
    options = tree.get("storage_options")
    configure(options if isinstance(options, dict) else {})
    folder = f"{output}/_batchgen/input"
    if keep:
        _refuse_unless_free(output)
    else:
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="batchgen-input-"))
    made, report = expanded_with_report(tree, folder)
    if report is not None and not quiet:
        echo(shown(report), err=True)
    meta = click.get_current_context().meta
    meta[_RECIPE] = {"recipe": tree["recipe"]}
    meta[_GIVEN] = made["input"]["path"], str(given_path or "")
    return made


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


def given_recipe() -> dict[str, Any]:
    """The recipe of this command's spec, as a tree with that section; empty without one."""
    context = click.get_current_context(silent=True)
    found: dict[str, Any] = context.meta.get(_RECIPE, {}) if context else {}
    return found


def _refuse_unless_free(output: str) -> None:
    """Refuse an output folder with files of others, before an import is written there."""
    from batchgen.output.holdings import refuse_unless_free
    from batchgen.output.ledger import Ledger
    from batchgen.storage import open_store

    refuse_unless_free(Ledger(open_store(output)))
