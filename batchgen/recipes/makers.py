"""Prepares a recipe: its source rows, classes and wildcards, and what makes each column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from batchgen.errors import InputError, SpecError
from batchgen.recipes.asking import Answerer, Answers, Asking
from batchgen.recipes.classes import Classes, read_classes
from batchgen.recipes.draws import Dice
from batchgen.recipes.field_section import Ask, FieldDraw
from batchgen.recipes.fields import Field, Prompts, texts
from batchgen.recipes.pairing import Pairing, Pool, image_column
from batchgen.recipes.reasons import Refused
from batchgen.recipes.recipe import Pair, Recipe
from batchgen.recipes.samples import Samples
from batchgen.recipes.sources import Source, listed_source, parquet_source
from batchgen.recipes.templates import Template
from batchgen.recipes.wildcards import SUFFIX, Wildcards, clean_lines, wildcard_name
from batchgen.storage import find_files, open_input

MAX_WILDCARD_BYTES = 64 << 20


class Maker(Protocol):
    """Adds columns to samples."""

    def add_to(self, samples: Samples) -> None: ...


@dataclass
class Makers:
    """Makes the makers of a recipe's columns.

    Attributes:
        recipe: what to make.
        source: its rows.
        answers: the answers of a language model that are known.
        functions: functions that answer questions, by name.
        stack: closes temporary files at the end.
    """

    recipe: Recipe
    source: Source
    answers: Answers
    functions: Mapping[str, Answerer]
    stack: ExitStack = field(default_factory=ExitStack)

    def all(self) -> list[Maker]:
        """List them in the order in which they run: fields, pairs, prompts."""
        recipe = self.recipe
        wildcards = read_wildcards(recipe)
        makers: list[Maker] = [
            self._field(name, drawn, wildcards) for name, drawn in recipe.all_fields().items()
        ]
        makers += [self._pairing(number, pair) for number, pair in enumerate(recipe.pair)]
        if recipe.templates:
            makers.append(self._prompts(wildcards))
        return makers

    def _prompts(self, wildcards: Wildcards) -> Prompts:
        recipe = self.recipe
        compiled = {
            name: (Template(f"templates.{name}", one.text, recipe.seed, wildcards), one.weight)
            for name, one in recipe.templates.items()
        }
        if not any(weight for _, weight in compiled.values()):
            raise SpecError("templates", 0, "at least one weight above 0")
        return Prompts(compiled, recipe.seed, recipe.each_template)

    def _field(self, name: str, drawn: FieldDraw, wildcards: Wildcards) -> Field:
        recipe, template, asked = self.recipe, None, None
        where = f"fields.{name}" if name in recipe.fields else name
        if drawn.template is not None:
            template = Template(where, drawn.template, recipe.seed, wildcards)
        if drawn.ask is not None:
            asked = self._asked(name, drawn.ask, wildcards)
        return Field(name, drawn, recipe.seed, template, asked)

    def _asked(
        self, name: str, ask: Ask, wildcards: Wildcards
    ) -> Callable[[Samples], list[str | None]]:
        question = Template(f"fields.{name}.ask.prompt", ask.prompt, self.recipe.seed, wildcards)
        asking = Asking(name, ask, self.answers, self.functions)
        dice = Dice(self.recipe.seed, f"fields.{name}")

        def answered(samples: Samples) -> list[str | None]:
            """The variants of a row get its answers in turn, from one that is drawn."""
            keys = [key.encode() for key in samples.row_keys]
            prompts = texts(question, samples, keys)
            found = asking.answers_to(prompts)
            starts = (dice.words(keys) % np.uint64(ask.count)).tolist()
            made: list[str | None] = []
            every = zip(prompts, starts, samples.variants.tolist(), strict=True)
            for number, (prompt, start, variant) in enumerate(every):
                answers = None if prompt is None else found[prompt]
                if isinstance(answers, Refused):
                    samples.refuse(number, answers)
                    answers = None
                made.append(answers[(start + variant) % ask.count] if answers else None)
            return made

        return answered

    def _pairing(self, number: int, pair: Pair) -> Pairing:
        where = f"pair.{number}" if len(self.recipe.pair) > 1 else "pair"
        source = self.source if pair.images is None else parquet_source(pair.images)
        label: str | None = self.recipe.label
        if label not in source.schema.names:
            label = source.declared.parts.get("label")
        if label is None and pair.partner.partner is not None:
            label = self.recipe.label
        column = image_column(source, source.declared.parts)
        pool = self.stack.enter_context(closing(Pool(source, column, label, where)))
        names = self.source.declared.class_names(self.recipe.label)
        return Pairing(self.recipe, pair, pool, names, where, pair.images is None)


def classes_and_source(recipe: Recipe) -> tuple[Classes, Source]:
    """Open the rows of a recipe, and read its table of classes.

    Raises:
        InputError: one of them cannot be read.
    """
    given = recipe.source
    if isinstance(given, str):
        source = parquet_source(given, recipe.key)
        _check_label(recipe, source)
        return read_classes(recipe.classes, source.declared.class_names(recipe.label)), source
    classes = read_classes(recipe.classes, None)
    if given is not None:
        source = listed_source(given, recipe.key, "from")
        _check_label(recipe, source)
        return classes, source
    if recipe.classes is not None:
        return classes, classes.source(recipe.key)
    return classes, listed_source([{}], None, "from")


def _check_label(recipe: Recipe, source: Source) -> None:
    if recipe.label not in source.schema.names:
        return
    kind = source.schema.field(recipe.label).type
    if pa.types.is_nested(kind) or pa.types.is_floating(kind):
        raise InputError(
            f"label: column {recipe.label!r} in {source.place} has type {kind}; needed: text or "
            "whole numbers; `label` names another column"
        )


def read_wildcards(recipe: Recipe) -> Wildcards:
    """Read all wildcard files of the recipe's folder.

    Raises:
        InputError: there is no such folder, or a file is not valid.
    """
    if recipe.wildcards is None:
        return Wildcards("", {})
    base, files = find_files(recipe.wildcards, SUFFIX)
    lines = {}
    for stat in files:
        name = stat.path.removeprefix(base).lstrip("/")
        if stat.size > MAX_WILDCARD_BYTES:
            raise InputError(f"wildcard file {name} is larger than {MAX_WILDCARD_BYTES:,} bytes")
        with open_input(stat.path, recipe.wildcards) as file:
            lines[wildcard_name(name)] = clean_lines(file.read(MAX_WILDCARD_BYTES), name)
    return Wildcards(recipe.wildcards, lines)
