"""The scorers of a job: checked and settled while planning, loaded by its replicas."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from batchgen.errors import SpecError
from batchgen.models.scorers import check_scorers, load_scorers
from batchgen.output.formats import own_columns
from batchgen.plan.plan import Plan
from batchgen.plan.scores import categories_of, source_schema, values_of
from batchgen.shard.prepare import class_number
from batchgen.shard.scored import has_sources, readable_schema, source_of
from batchgen.stages.scorers.scorer import Scorer


def scorers_of(plan: Plan, device: str) -> list[Scorer]:
    """Load the scorers of a job on the device of its decoder."""
    return load_scorers(plan.spec.score, device, plan.spec.resources.torch_threads)


def with_scorers(plan: Plan) -> Plan:
    """The plan with its scorers settled, see ``check_scorers``.

    Raises:
        SpecError, ModelError: a scorer that cannot score the images of this job.
    """
    spec = plan.spec
    if not spec.score:
        return plan
    source = source_schema(plan)
    bare = replace(plan, spec=spec.model_copy(update={"score": ()}))
    schema = readable_schema(bare, source)

    def values(name: str) -> Collection[object]:
        column = spec.input.columns.class_label
        if name == "class_label" and column is not None:  # stored as a number
            given = values_of(plan, column)
            numbers = {class_number(value, plan.model.class_names) for value in given}
            return numbers - {None}
        if name == "objects":
            return categories_of(plan)
        return values_of(plan, source_of(name, bare))

    found = check_scorers(
        spec.score,
        schema,
        values,
        has_sources(plan),
        spec.labels.names or (),
        {"class_label": plan.model.class_names if any(plan.model.class_names) else ()},
    )
    ours = own_columns(bare.spec, plan.model.settings).names
    settled = replace(plan, spec=spec.model_copy(update={"score": found}))
    readable = readable_schema(settled, source).names
    for one in found:
        assert one.settled is not None
        for name in one.settled.columns:
            if name.lower() in ours:
                because = f"it fills the column {name}, which every output has"
                raise SpecError("score.scorer", one.scorer, "", because=because)
        for name in one.settled.reads:
            if name not in readable:
                because = f"it reads the column {name}, which another scorer fills"
                raise SpecError("score.scorer", one.scorer, "", because=because)
    return settled
