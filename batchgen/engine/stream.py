"""The Ray Data graph: spans are read, shards flow through pools of actors, markers come back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

# Ray reads this when it is imported. Our own lines tell of shards begun again and of a lost raylet;
# that a node has many replicas is as it was asked for.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "infinite retries remaining|Raylet is terminated|worker processes have been started on node",
)

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from batchgen.attempts import News
from batchgen.engine.actors import Job
from batchgen.engine.listen import listening
from batchgen.engine.metrics import Metrics
from batchgen.engine.pools import Pools
from batchgen.engine.read import Read
from batchgen.engine.shared import SharedAttempts
from batchgen.errors import Interrupted, StopJob, StorageFailed, from_facts
from batchgen.input.reader import Span, make_spans, read_columns
from batchgen.output.ledger import FailedMarker, Ledger, Marker, parse_failed, parse_marker
from batchgen.plan.plan import Plan
from batchgen.shard import frames
from batchgen.shard.frames import Frame

READ_AHEAD = 8  # shards a reader may be ahead; Ray's 2 give no more than 10 shards a second
READ_AHEAD_BYTES = 64 << 20  # of them; Ray Data's memory budget does not count what is ahead


def generate(
    plan: Plan,
    ledger: Ledger,
    pending: Sequence[int],
    pools: Pools,
    hear: Callable[[News], None] | None = None,
) -> Generator[Marker | FailedMarker, None, None]:
    """Make the pending shards; yields each one's marker, or failed marker, as it ends.

    Args:
        plan: the job's.
        ledger: of its output.
        pending: numbers of the shards to make.
        pools: the actors to stream through and what each reserves (``pools_of``).
        hear: is told, in a thread of its own, what a user ought to know meanwhile.

    Raises:
        StopJob: what a stage found that no other shard can escape.
    """
    metrics = Metrics(ledger.store.url)
    job = Job(plan.without_files(), ledger.store.url, time.time())
    attempts = SharedAttempts({actor.__name__: share.start_replicas for actor, share in pools})
    spans = make_spans(plan, pending)
    readers = max(2, *(share.start_replicas for _, share in pools))
    stream = _read(spans, plan, min(readers, len(spans)))
    for actor, share in pools:
        stream = stream.map_batches(
            actor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=share.min_replicas,
                max_size=share.max_replicas,
                initial_size=share.start_replicas,
                max_concurrent_calls_per_actor=plan.spec.resources.shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            accelerator_type=share.accelerator_type,
            resources=dict(share.resources) or None,
            fn_constructor_args=(job, attempts),
        )
    try:
        with listening(attempts, hear) as end:
            for row in stream.iter_rows():
                event = _event(Frame(**row))
                end(event.shard)
                metrics.count(event)
                yield event
    except ray.exceptions.RayError as error:
        raise Interrupted(f"Ray ended the stream: {type(error).__name__}: {error}") from error


def _event(frame: Frame) -> Marker | FailedMarker:
    if frame.state == frames.COMMITTED:  # the marker may be an earlier attempt's that came back
        return replace(parse_marker(frame.facts), attempt=frame.attempt)
    if frame.state == frames.FAILED:
        return parse_failed(frame.facts)
    error = from_facts(json.loads(frame.facts))
    raise error if isinstance(error, StopJob) else StorageFailed(str(error))


def _read(spans: list[Span], plan: Plan, readers: int) -> Dataset:
    """The first stage; each of the ``readers`` is a process, which takes seconds to start.

    They reserve no CPU: they wait for the store most of the time, and replicas that together have
    reserved all CPUs would leave the job without a reader, for ever and without a word.
    """
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context._max_num_blocks_in_streaming_gen_buffer = _read_ahead(plan)
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    items = [{"span": span.to_json()} for span in spans]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Read,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=readers, max_tasks_in_flight_per_actor=1),
        num_cpus=0,
        fn_constructor_args=(plan.spec, columns),
    )


def _read_ahead(plan: Plan) -> int:
    """Shards a reader may be ahead: fewer where their rows are large, as images are."""
    first, stop = plan.row_range(0)
    per_shard = sum(file.size for file in plan.files) * (stop - first) // plan.rows
    return max(1, min(READ_AHEAD, READ_AHEAD_BYTES // max(1, per_shard)))
