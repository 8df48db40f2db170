"""The real stream in this process: reader, frames, actors, writer and ledger, without Ray.

In processes of their own the actors would each import the model libraries again. (That Ray carries
their frames is the matter of `tests/ray/test_run.py` and of `python -m tests.chaos.families`.)
"""

from __future__ import annotations

from batchgen import runner
from batchgen.attempts import Attempts
from batchgen.engine.actors import Decode, Denoise, Encode, Generate, Job, StageActor
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker, parse_marker
from batchgen.shard.frames import COMMITTED, from_block, from_rows
from batchgen.spec.spec import Spec
from batchgen.storage import open_store

LAYOUTS: dict[str, tuple[type[StageActor], ...]] = {
    "fused": (Generate,),
    "staged": (Encode, Denoise, Decode),
}


def stream(spec: Spec) -> list[Marker]:
    """Does what `engine.stream.generate` does, with all actors in this process."""
    plan = runner.plan_job(spec)
    ledger = Ledger(open_store(spec.output.url))
    ledger.freeze(plan, spec)
    job = Job(plan, ledger.store.url, 0.0)
    attempts = Attempts()
    actors = [actor(job, attempts) for actor in LAYOUTS[spec.resources.layout]]
    markers = []
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    for span in make_spans(plan, range(plan.shards)):
        for shard_rows in read_span(span, plan.spec, columns):
            block = from_rows(shard_rows).to_block()
            for actor in actors:
                block = actor(block)
            frame = from_block(block)
            assert frame.state == COMMITTED, frame.facts.decode()[:2000]
            markers.append(parse_marker(frame.facts))
    return markers
