"""Makes the columns of a recipe's fields: constants, draws, columns, texts and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from batchgen.errors import InputError, nearest
from batchgen.recipes import draws
from batchgen.recipes.field_section import FieldDraw
from batchgen.recipes.reasons import Refused
from batchgen.recipes.samples import TEMPLATE, Samples
from batchgen.recipes.templates import Template
from batchgen.spec.call_settings import CALL_SETTINGS

Asked = Callable[[Samples], list[str | None]]


class Field:
    """Makes one column.

    Args:
        name: of the field, and of its column.
        drawn: how its values come about.
        seed: that of the recipe.
        template: its template, if it is a text.
        asked: gives the answers of a language model, if it is a question.
    """

    def __init__(
        self,
        name: str,
        drawn: FieldDraw,
        seed: int,
        template: Template | None = None,
        asked: Asked | None = None,
    ) -> None:
        self.name = name
        self._drawn = drawn
        self._dice = draws.Dice(seed, f"fields.{name}")
        self._template = template
        self._asked = asked
        self._type = value_type(name, drawn)

    def add_to(self, samples: Samples) -> None:
        """Make the column of these samples; those whose value is wrong are rejected."""
        samples.add(self.name, self._made(samples))

    def _made(self, samples: Samples) -> pa.Array:
        drawn = self._drawn
        if drawn.way == "value":
            return pa.array([drawn.value] * len(samples), self._type)
        if drawn.way == "each":
            values = [one.values[self.name] for one in samples.combos]
            return pa.array([values[one] for one in samples.combo.tolist()], self._type)
        if drawn.way == "column":
            return self._column(samples, str(drawn.column))
        if self._template is not None:
            return pa.array(texts(self._template, samples), pa.string())
        if self._asked is not None:
            return pa.array(self._asked(samples), pa.string())
        words = self._dice.words(samples.draw_keys)
        if drawn.way == "choice":
            return self._choice(words)
        return self._numbers(words)

    def _choice(self, words: draws.Words) -> pa.Array:
        values, weights = self._drawn.options
        names = [f"{type(one).__name__} {one}" for one in values]
        places = draws.chosen(words, names, weights)
        return pa.array(values, self._type).take(pa.array(places))

    def _numbers(self, words: draws.Words) -> pa.Array:
        values = numbers(self._drawn, words, self._step)
        if pa.types.is_integer(self._type):
            values = np.round(values)
        return pa.array(values).cast(self._type)

    @property
    def _step(self) -> float | None:
        whole = pa.types.is_integer(self._type)
        return 1.0 if whole and self._drawn.step is None else self._drawn.step

    def _column(self, samples: Samples, column: str) -> pa.Array:
        if not samples.has(column):
            known = samples.batch.table.column_names
            raise InputError(
                f"fields.{self.name}.column: there is no column {column!r}{nearest(column, known)}"
            )
        made = samples.made[column] if column in samples.made else samples.taken(column)
        setting = CALL_SETTINGS.get(self.name)
        if setting is None or not setting.by_row:
            return made
        wrong: dict[Any, str | None] = {}
        for number, value in enumerate(samples.values(column)):
            if value is None:
                continue
            name = repr(value)
            if name not in wrong:
                wrong[name] = _fault(setting.adapter, value)
            said = wrong[name]
            if said is not None:
                message = f"column {column!r} has {name[:60]}; allowed: {said}"
                samples.refuse(number, Refused(f"bad-{self.name}", message))
        return made


def numbers(drawn: FieldDraw, words: draws.Words, step: float | None) -> draws.Floats:
    """Draw numbers from a distribution."""
    if drawn.normal is not None:
        low, high = drawn.normal.limits
        values = draws.normal(words, drawn.normal.mean, drawn.normal.std, low, high)
        return values if step is None else draws.snapped(values, low, high, step)
    if drawn.log_uniform is not None:
        low, high = drawn.log_uniform
        values = draws.log_uniform(words, low, high)
        return values if step is None else draws.snapped(values, low, high, step)
    assert drawn.uniform is not None
    low, high = drawn.uniform
    if step is None:
        return draws.uniform(words, low, high)
    return draws.on_grid(words, low, high, step)


def texts(template: Template, samples: Samples, keys: Sequence[bytes] | None = None) -> list[Any]:
    """Make the text of each sample; None for those that are rejected."""
    known = [name for name in template.names if samples.has(name)]
    columns = [samples.values(name) for name in known]
    keys = samples.draw_keys if keys is None else keys
    made: list[str | None] = []
    for number, key in enumerate(keys):
        values = {}
        for name, column in zip(known, columns, strict=True):
            value = column[number]
            if value is not None:
                values[name] = value
        try:
            made.append(template.render(key, values))
        except Refused as why:
            samples.refuse(number, why)
            made.append(None)
    return made


class Prompts:
    """Makes the columns ``template`` and ``prompt``.

    Args:
        templates: name -> template, and its weight.
        seed: that of the recipe.
        each: every template is used, as one of the combinations.
    """

    def __init__(self, templates: dict[str, tuple[Template, float]], seed: int, each: bool) -> None:
        self._names = list(templates)
        self._templates = [template for template, _ in templates.values()]
        self._weights = [weight for _, weight in templates.values()]
        self._dice = draws.Dice(seed, TEMPLATE)
        self._each = each

    def add_to(self, samples: Samples) -> None:
        """Choose the template of each sample, and make its prompt."""
        if self._each:
            names = [one.values[TEMPLATE] for one in samples.combos]
            of_combos = np.array([self._names.index(one) for one in names])
            places = of_combos[samples.combo]
        else:
            words = self._dice.words(samples.draw_keys)
            places = draws.chosen(words, self._names, self._weights)
        prompts: list[str | None] = [None] * len(samples)
        for number, template in enumerate(self._templates):
            mine = np.flatnonzero(places == number).tolist()
            if mine:
                self._render(template, samples, mine, prompts)
        samples.add(TEMPLATE, pa.array(self._names, pa.string()).take(pa.array(places)))
        samples.add("prompt", pa.array(prompts, pa.string()))

    def _render(
        self, template: Template, samples: Samples, mine: list[int], prompts: list[str | None]
    ) -> None:
        known = [name for name in template.names if samples.has(name)]
        columns = [samples.values(name) for name in known]
        keys = samples.draw_keys
        for number in mine:
            values = {}
            for name, column in zip(known, columns, strict=True):
                value = column[number]
                if value is not None:
                    values[name] = value
            try:
                prompts[number] = text = template.render(keys[number], values)
                if not text:
                    message = f"{template.field}: the text is empty"
                    samples.refuse(number, Refused("empty-prompt", message))
            except Refused as why:
                samples.refuse(number, why)


def value_type(name: str, drawn: FieldDraw) -> pa.DataType:
    """The type of a field's column."""
    setting = CALL_SETTINGS.get(name)
    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    wanted = kinds[setting.kind] if setting is not None and setting.by_row else None
    if drawn.way in ("value", "each", "choice"):
        known = [one for one in drawn.known_values() if one is not None]
        if not known:
            return wanted or pa.string()
        if isinstance(known[0], bool):
            return pa.bool_()
        if isinstance(known[0], str):
            return pa.string()
        whole = all(isinstance(one, int) for one in known)
        return wanted or (pa.int64() if whole else pa.float64())
    if drawn.way in ("uniform", "log_uniform", "normal"):
        if wanted is not None:
            return wanted
        low = drawn.normal.limits[0] if drawn.normal else drawn.known_values()[0]
        start = low if math.isfinite(low) else 0.0
        whole = drawn.step is not None and drawn.step.is_integer() and start.is_integer()
        return pa.int64() if whole else pa.float64()
    return pa.string()


def _fault(adapter: Any, value: Any) -> str | None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        said: str = error.errors()[0]["msg"].removeprefix("Input should be ")
        return said
    return None
