"""The recipe of a job: expanded before the plan, into the folder of the job's input."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchgen.errors import LimitExceeded, SpecError
from batchgen.recipes.expand import Expanded, expand
from batchgen.recipes.presets import with_recipe
from batchgen.recipes.recipe import Recipe, build_recipe
from batchgen.recipes.sources import declared
from batchgen.recipes.writing import write_small
from batchgen.secrets import redact
from batchgen.spec.tasks import LABEL_PARTS, TASK_NAMES, task_named
from batchgen.spec.tree import canonical_json, read_yaml, spread
from batchgen.storage import Store, absolute, find_files, open_store

VERSION = 1  # raised if the same recipe would give other rows
ANSWERS = "answers.jsonl"
_PLACES = ("from", "classes", "wildcards", "images")  # fields of a recipe that may be paths


def expanded(tree: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Expand the section ``recipe`` of a spec's tree; a tree without one is returned as it is.

    The rows are written to the folder, with the text of the recipe next to them, and the tree gets
    their path and columns. If the folder has the rows of the same recipe and the same sources, they
    stay as they are, so that a repeated command continues its job.

    Args:
        tree: nested dictionaries, as read from YAML and merged with flags.
        folder: a folder or URL, such as ``OUTPUT/_batchgen/input``.

    Raises:
        InputError, SpecError: the recipe or its rows are wrong.
        LimitExceeded: more samples were rejected than ``policy.rejected_limit``.
    """
    return expanded_with_report(tree, folder)[0]


def expanded_with_report(
    tree: Mapping[str, Any], folder: str
) -> tuple[dict[str, Any], Expanded | None]:
    """Do what ``expanded`` does; also returns what was written, None if nothing was."""
    given = tree.get("recipe")
    if given is None:
        return {name: value for name, value in tree.items() if name != "recipe"}, None
    tree = spread(tree)
    source = tree.get("input") or {}
    if not isinstance(source, Mapping):
        raise SpecError("input", source, "a section, or a path")
    recipe_tree = _recipe_tree(given, tree, source)
    recipe = build_recipe(recipe_tree)
    _refuse_other_image(recipe, _own_columns(source))
    store = open_store(folder)
    name = f"rows-{_digest(recipe_tree, recipe)[:12]}.parquet"
    path, report = f"{store.url}/{name}", None
    if name not in store.list(""):
        report = _expand(recipe, store, path)
        limit = (tree.get("policy") or {}).get("rejected_limit", 0.1)
        if isinstance(limit, int | float) and report.rejected_fraction > limit:
            store.delete(name)  # so that a repeated command does not take it for good
            raise LimitExceeded(
                f"recipe: {sum(report.rejected.values()):,} of "
                f"{report.samples + sum(report.rejected.values()):,} samples were rejected, more "
                f"than policy.rejected_limit allows; see {report.rejects}"
            )
        text = yaml.safe_dump(recipe_tree, sort_keys=False, allow_unicode=True, width=100)
        own = name.replace("rows-", "recipe-").replace(".parquet", ".yaml")
        write_small(store, own, text.encode())
    kept = {key: value for key, value in tree.items() if key not in ("recipe", "variants")}
    columns = {**_columns(store, name, tree), **_own_columns(source)}
    made = {key: value for key, value in source.items() if key not in ("path", "columns")}
    made.setdefault("uri_roots", source_roots(recipe, path))
    kept["input"] = {"path": path, **made, "columns": {**columns, "key": "key"}}
    return kept, report


def _recipe_tree(given: Any, tree: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the spec says: its input, its seed, its variants and its columns."""
    recipe = read_yaml(given) if isinstance(given, str) else given
    if not isinstance(recipe, Mapping):
        raise SpecError("recipe", given, "a section, or the path of a recipe file")
    own = dict(recipe)
    name = own.pop("preset", None)
    made = with_recipe(str(name), own) if name is not None else own
    if source.get("path"):
        if own.get("from") is not None:
            because = "the recipe has its rows (recipe.from); remove one of the two"
            raise SpecError("input.path", source["path"], "null", because=because)
        made["from"] = source["path"]
    made.setdefault("seed", tree.get("seed") or 0)
    if tree.get("variants") is not None:
        made["variants"] = tree["variants"]
    columns = _own_columns(source)
    for field in ("key", "label"):
        if columns.get(field) is not None:
            made.setdefault(field, columns[field])
    return made


def _refuse_other_image(recipe: Recipe, columns: Mapping[str, Any]) -> None:
    """Refuse columns of the spec that are about another image than that of a pair.

    Raises:
        SpecError: names the column.
    """
    if "image" not in [pair.into for pair in recipe.pair]:
        return
    for part in ("image", *LABEL_PARTS):
        if columns.get(part) is not None:
            because = (
                "recipe.pair gives each row the image of another row, of which this column says "
                "nothing; remove one of the two"
            )
            raise SpecError(f"input.columns.{part}", columns[part], "null", because=because)


def _own_columns(source: Mapping[str, Any]) -> dict[str, Any]:
    columns = source.get("columns")
    return dict(columns) if isinstance(columns, Mapping) else {}


def _expand(recipe: Recipe, store: Store, path: str) -> Expanded:
    """Expand; the answers of a language model are kept in the folder, also if it fails."""
    if store.local:
        return expand(recipe, path, answers_path=f"{store.url}/{ANSWERS}")
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, ANSWERS)
        with suppress(FileNotFoundError), open(local, "wb") as file:
            file.write(store.read(ANSWERS))
        try:
            return expand(recipe, path, answers_path=local)
        finally:
            if os.path.exists(local) and os.path.getsize(local):
                with open(local, "rb") as file:
                    write_small(store, ANSWERS, file.read())


def _digest(tree: Mapping[str, Any], recipe: Recipe) -> str:
    """SHA-256 of the recipe and of the files that it reads."""
    places = [recipe.source, recipe.classes, *(pair.images for pair in recipe.pair)]
    stats = []
    for place in places:
        if isinstance(place, str):
            suffix = ".csv" if place.lower().endswith(".csv") else ".parquet"
            stats += [[one.path, one.size, one.etag] for one in find_files(place, suffix)[1]]
    if recipe.wildcards is not None:
        files = find_files(recipe.wildcards, ".txt")[1]
        stats += [[one.path, one.size, one.etag] for one in files]
    facts = [VERSION, _placed(tree), stats]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _placed(tree: Any, name: str = "") -> Any:
    """The recipe with absolute places, so that it is the same from another working directory."""
    if isinstance(tree, Mapping):
        return {one: _placed(value, one) for one, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_placed(one, name) for one in tree] if name == "pair" else tree
    return absolute(tree) if name in _PLACES and isinstance(tree, str) else tree


def _columns(store: Store, name: str, tree: Mapping[str, Any]) -> dict[str, str]:
    """The columns of the rows that the job's task uses."""
    with store.open(name) as file:
        schema = pq.read_schema(file)
    return task_columns(schema, str(tree.get("task", "text-to-image")).replace("_", "-"))


def task_columns(schema: pa.Schema, task: str) -> dict[str, str]:
    """Part of ``input.columns`` -> column, for the parts of rows that a task uses."""
    parts = declared(schema).parts
    if task not in TASK_NAMES:
        return {}  # the spec's own check says what is allowed
    used = task_named(task).parts
    return {part: column for part, column in parts.items() if part in used}


def source_roots(recipe: Recipe, rows: str) -> list[str] | None:
    """The places whose images the rows may name: those of the recipe's own sources."""
    places = [recipe.source, *(pair.images for pair in recipe.pair)]
    roots = [_root(place) for place in places if isinstance(place, str)]
    return list(dict.fromkeys([*roots, _root(rows)])) if roots else None


def _root(place: str) -> str:
    """The bucket of a URL, or the folder of a local file."""
    scheme, mark, rest = place.partition("://")
    if mark and scheme != "file":
        return f"{scheme}://{rest.partition('/')[0]}"
    local = os.path.abspath(rest if mark else place)
    return local if os.path.isdir(local) else posixpath.dirname(local)


def shown(report: Expanded) -> str:
    """Describe an expansion in one line."""
    rejected = sum(report.rejected.values())
    lost = f"; {rejected:,} rejected, see {report.rejects}" if rejected else ""
    return redact(f"recipe: {report.samples:,} samples of {report.rows:,} rows{lost}")
