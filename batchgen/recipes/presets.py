"""Presets: recipes and settings by name, with the evidence for them, in ``batchgen/presets/``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from batchgen.errors import SpecError, nearest
from batchgen.spec.model import Section
from batchgen.spec.tree import flatten, merge
from batchgen.spec.yaml_text import parse_yaml

FOLDER = Path(__file__).parents[1] / "presets"


class Preset(Section):
    """A preset.

    Attributes:
        about: what it makes, in one sentence.
        paper: where it comes from.
        brought: what it was shown to bring, with figures and their source.
        hurt: where it was shown to hurt, or not to help.
        cost: what it costs for each sample.
        models: with which models.
        rows: what the rows must have.
        differs: how it differs from the paper.
        recipe: a recipe without its rows.
        spec: settings of the job.
        command: one line that runs it on the shipped model.
    """

    about: str
    paper: str
    brought: tuple[str, ...]
    hurt: tuple[str, ...]
    cost: str
    models: str
    rows: str
    differs: tuple[str, ...] = ()
    recipe: dict[str, Any]
    spec: dict[str, Any] = Field(default={})
    command: str


@cache
def names() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def text_of(name: str) -> str:
    """The text of a preset's file.

    Raises:
        SpecError: there is no preset of this name.
    """
    if name not in names():
        raise SpecError("preset", name, f"{', '.join(names())}{nearest(name, names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        SpecError: there is no preset of this name.
    """
    try:
        return Preset.model_validate(parse_yaml(text_of(name), f"preset {name}"))
    except ValidationError as error:
        raise AssertionError(f"preset {name} is not valid: {error}") from error


def with_recipe(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a recipe with that of a preset; what the recipe has wins, field by field."""
    base = copy.deepcopy(preset(name).recipe)
    fields = {**(base.get("fields") or {}), **(recipe.get("fields") or {})}
    merged = {**base, **recipe}
    if fields:
        merged["fields"] = {key: value for key, value in fields.items() if value is not None}
    if recipe.get("balance") and "variants" not in recipe:
        merged.pop("variants", None)
    return merged


def with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a spec's tree with the preset that its field ``preset`` names; what it has wins.

    Raises:
        SpecError: there is no preset of this name.
    """
    own = {key: value for key, value in tree.items() if key != "preset"}
    name = tree.get("preset")
    if name is None:
        return own
    recipe = own.pop("recipe", None) or {}
    if not isinstance(recipe, Mapping):
        because = "the preset has a recipe; write the fields that differ as a mapping"
        raise SpecError("recipe", recipe, "a mapping", because=because)
    made = merge(copy.deepcopy(preset(str(name)).spec), flatten(own))
    return {**made, "recipe": with_recipe(str(name), recipe)}


def table() -> str:
    """The table of docs/presets.md."""
    lines = ["| preset | makes | needs | paper |", "| --- | --- | --- | --- |"]
    for name in names():
        one = preset(name)
        lines.append(f"| [`{name}`](#{name}) | {one.about} | {one.rows} | {one.paper} |")
    return "\n".join(lines)


def section(name: str) -> str:
    """What docs/presets.md says about one preset."""
    one = preset(name)
    lines = [f"## {name}", "", f"{one.about[0].upper()}{one.about[1:]} ({one.paper}).", ""]
    lines += [f"Rows: {one.rows}. Models: {one.models}. Cost: {one.cost}."]
    parts = {
        "What it was shown to bring:": one.brought,
        "Where it was shown to hurt, or not to help:": one.hurt,
        "How this preset differs from the paper:": one.differs,
    }
    for title, texts in parts.items():
        if texts:
            lines += ["", title, "", *(f"- {text}" for text in texts)]
    lines += ["", "```bash", one.command, "```", ""]
    lines += [f"![{name}: what was given, and what was made of it](images/presets/{name}.png)"]
    return "\n".join(lines)


def page() -> str:
    """docs/presets.md after its first part."""
    return "\n\n".join([table(), *map(section, names())])
