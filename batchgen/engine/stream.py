"""Builds and runs the Ray Data graph: readers, pools of actors, and the markers they return."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace

# Ray reads this on import. It hides messages that batchgen reports itself (retried shards, a lost
# raylet), and a warning about many processes on one node, which the spec may have asked for.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "infinite retries remaining|Raylet is terminated|worker processes have been started on node",
)

# A pool waits while the next one has shards for a while. Ray Data would wait only once half of the
# object store is full: prompts are so few bytes that readers would read a million of them ahead, at
# 19 kB of the driver's memory a shard, and latents would fill the store.
os.environ.setdefault("RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD", "0")

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
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker, parse_failed, parse_marker
from batchgen.plan.plan import Plan
from batchgen.shard import frames
from batchgen.shard.frames import Frame

READ_AHEAD = 8  # shards that a reader may be ahead; with Ray's 2 it yields 10 shards/s at most
READ_AHEAD_BYTES = 64 << 20  # limit of their size; Ray Data's memory budget does not count them


def generate(
    plan: Plan,
    ledger: Ledger,
    pending: Sequence[int],
    pools: Pools,
    hear: Callable[[News], None] | None = None,
) -> Generator[Marker | FailedMarker, None, None]:
    """Generate the pending shards; yields the marker or failed marker of each one as it ends.

    Args:
        plan: the plan of the job.
        ledger: the ledger of its output.
        pending: numbers of the shards to generate.
        pools: the actor classes of the layout and what each replica reserves (``pools_of``).
        hear: called in a separate thread with news for the display.

    Raises:
        StopJob: an error that every other shard would have too.
    """
    metrics = Metrics(ledger.store.url)
    job = Job(plan.without_files(), ledger.store.url, time.time())
    starts = {actor.__name__: reservation.start_replicas for actor, reservation in pools}
    attempts = SharedAttempts(starts)
    spans = make_spans(plan, pending)
    readers = max(2, *starts.values())
    _set_up_ray_data(_read_ahead(plan))
    stream = _read(spans, plan, min(readers, len(spans)))
    stream = _through(stream, pools, plan.spec.resources.shards_in_flight, (job, attempts))
    for event in events(stream, attempts, hear):
        metrics.count(event)
        yield event


def stream_of(
    frames: Sequence[Frame],
    pools: Pools,
    shards_in_flight: int,
    job: Job,
    hear: Callable[[News], None] | None = None,
) -> Generator[Marker | FailedMarker, None, None]:
    """Send frames through pools whose actors read what they need; yields markers as ``generate``.

    Args:
        frames: one for each shard.
        pools: actor classes and what each replica reserves.
        shards_in_flight: shards that an actor works on at a time.
        job: the argument of the actors.
        hear: called in a separate thread with news for the display.
    """
    starts = {actor.__name__: reservation.start_replicas for actor, reservation in pools}
    attempts = SharedAttempts(starts)
    _set_up_ray_data(READ_AHEAD)
    items = [asdict(frame) for frame in frames]
    stream = ray.data.from_items(items, override_num_blocks=len(items))
    stream = _through(stream, pools, shards_in_flight, (job, attempts))
    yield from events(stream, attempts, hear)


def _through(
    stream: Dataset, pools: Pools, shards_in_flight: int, arguments: tuple[Job, SharedAttempts]
) -> Dataset:
    """The stream after these pools of actors."""
    for actor, reservation in pools:
        stream = stream.map_batches(
            actor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=reservation.start_replicas,
                max_size=reservation.max_replicas,
                max_concurrent_calls_per_actor=shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=reservation.num_cpus,
            num_gpus=reservation.num_gpus,
            accelerator_type=reservation.accelerator_type,
            resources=dict(reservation.resources) or None,
            fn_constructor_args=arguments,
        )
    return stream


def events(
    stream: Dataset, attempts: SharedAttempts, hear: Callable[[News], None] | None
) -> Generator[Marker | FailedMarker, None, None]:
    """The markers and failed markers that a stream returns; ends the record of attempts."""
    try:
        with listening(attempts, hear) as end:
            for row in stream.iter_rows():
                event = _event(Frame(**row))
                end(event.shard)
                yield event
    except ray.exceptions.RayError as error:
        raise Interrupted(f"Ray ended the stream: {type(error).__name__}: {error}") from error
    attempts.end()  # not after an error: without a head, Ray would wait for it


def _set_up_ray_data(read_ahead: int) -> None:
    context = DataContext.get_current()
    # Each shard becomes a block of its own. With Ray's default of 128 MB all prompts of a dataset
    # would be one block, and one actor would do all the work.
    context.target_max_block_size = 1
    context._max_num_blocks_in_streaming_gen_buffer = read_ahead
    # Ray Data would walk the memory map of each replica once a second and shard in flight (10 ms
    # with torch loaded, during which the replica cannot allocate), for a metric that nobody reads.
    context.memory_usage_poll_interval_s = None


def _event(frame: Frame) -> Marker | FailedMarker:
    if frame.state == frames.COMMITTED:  # the marker may be that of an earlier attempt
        return replace(parse_marker(frame.facts), attempt=frame.attempt)
    if frame.state == frames.FAILED:
        return parse_failed(frame.facts)
    error = from_facts(json.loads(frame.facts))
    raise error if isinstance(error, StopJob) else StorageFailed(str(error))


def _read(spans: list[Span], plan: Plan, readers: int) -> Dataset:
    """The first stage, with ``readers`` actors; each is a process, which takes seconds to start.

    Readers reserve no CPU. They wait for the store most of the time, and if replicas had reserved
    all CPUs, a reader that needs one would never start, and the job would hang without a message.
    """
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
    """Number of shards that a reader may be ahead: fewer if rows are large, such as images."""
    first, stop = plan.row_range(plan.numbers.start)
    per_shard = sum(file.size for file in plan.files) * (stop - first) // plan.rows
    return max(1, min(READ_AHEAD, READ_AHEAD_BYTES // max(1, per_shard)))
