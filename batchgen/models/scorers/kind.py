"""What each kind of scorer implements: a check without weights, and loading."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.errors import SpecError
from batchgen.models.scorers.class_map import declared_names
from batchgen.spec.score_section import ScorerSpec, Settled
from batchgen.stages.scorers.scorer import Scorer, kind_text

ONE = 1  # image in a call
TAKEN = ("key", "image")  # columns by which scores and samples belong together
MAPPED = ("label", "class_label", "prompt", "objects")  # columns of an output if they are mapped
COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


def call_size(spec: ScorerSpec, device: str) -> int:
    """The number of images in a call of a scorer's model.

    On a CPU it is one: there the last bits of a sum depend on the place of an image in its batch,
    and large models gain a quarter at most by batches.
    """
    return ONE if device == "cpu" else spec.batch_size


@dataclass(frozen=True)
class Job:
    """What the images to score come with.

    Attributes:
        schema: the columns of the output that scorers may read, with its metadata.
        values: returns the different values of a column, without null; for ``objects`` those of
            their categories.
        has_sources: whether the images have conditioning images to compare with.
        categories: names of the categories of objects, by number; empty if they are not known.
        class_names: column -> names of its classes by number, beside those of the schema.
    """

    schema: pa.Schema
    values: Callable[[str], Collection[Any]] = lambda name: ()
    has_sources: bool = False
    categories: Sequence[str] = ()
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def names(self, column: str) -> tuple[str, ...]:
        """The names of a column's classes by number; empty if they are not known."""
        return tuple(self.class_names.get(column, ())) or declared_names(self.schema, column)

    def sorted_values(self, column: str) -> list[Any]:
        """The different values of a column, always in the same order."""
        return sorted(self.values(column), key=lambda value: (isinstance(value, str), str(value)))

    def refuse_missing(
        self, spec: ScorerSpec, reads: Iterable[str], compares: bool = False
    ) -> None:
        """Refuse a scorer that reads what the images do not come with.

        Raises:
            SpecError: names the column and those that there are.
        """
        for name in reads:
            if name not in self.schema.names:
                because = (
                    f"it reads the column {name!r}, which the output does not have; its columns: "
                    f"{', '.join(self.schema.names)}"
                )
                if name in MAPPED:
                    because += f" (a run has it if you map it with input.columns.{name})"
                raise SpecError("score.scorer", spec.scorer, "", because=because)
        if compares and not self.has_sources:
            because = "it compares with conditioning images, and this task reads none"
            raise SpecError("score.scorer", spec.scorer, "", because=because)


@dataclass(frozen=True)
class Kind:
    """One kind of scorer.

    Attributes:
        settle: checks a scorer against a job and completes its specification, without its weights.
        load: makes the scorer on a torch device.
    """

    settle: Callable[[ScorerSpec, Job], ScorerSpec]
    load: Callable[[ScorerSpec, str], Scorer]


def settled(spec: ScorerSpec, scorer: Scorer, **known: Any) -> ScorerSpec:
    """The specification with what is known of its scorer; ``known``: more fields of ``Settled``."""
    for one in scorer.columns:
        if one.name.lower() in TAKEN or not COLUMN.fullmatch(one.name):
            because = (
                f"it fills a column named {one.name!r}; a name of a column has letters, digits and "
                f"_, begins with no digit, and is not {' or '.join(TAKEN)}"
            )
            raise SpecError("score.scorer", spec.scorer, "", because=because)
    facts = Settled(
        fingerprint=scorer.fingerprint,
        columns={one.name: kind_text(one.kind) for one in scorer.columns},
        about={one.name: one.about for one in scorer.columns},
        reads=tuple(scorer.reads),
        compares=scorer.compares,
        **known,
    )
    return spec.model_copy(update={"settled": facts})


def weightless(make: Callable[[ScorerSpec], Scorer]) -> Kind:
    """A kind of scorer that reads no model."""
    return Kind(lambda spec, job: settled(spec, make(spec)), lambda spec, device: make(spec))
