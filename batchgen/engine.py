"""The Ray Data graph: spans are read, shards flow through pools of actors, markers come back."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

# Ray reads this when it is imported: our own lines tell of a shard that had to be begun again.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "infinite retries remaining")

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from batchgen import errors, frames, replicas, shard, wire
from batchgen.errors import ModelError, RetryShard, StopJob, StorageFailed, UsageError
from batchgen.frames import Frame
from batchgen.ledger import FailedMarker, Ledger, Marker, parse_marker
from batchgen.plan import Plan
from batchgen.reader import Span, make_spans, read_columns, read_span, span_from_json
from batchgen.spec import Pool
from batchgen.storage import open_store

READER_CPUS = 0.05
BACKOFF_S = 0.5
LOCAL_OBJECT_STORE_BYTES = 2 << 30


@dataclass(frozen=True)
class Share:
    """What one replica of a pool reserves, and how many there may be."""

    min_replicas: int
    max_replicas: int
    num_cpus: float
    num_gpus: float


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at ``address`` or start Ray on this machine; what was started is ended."""
    _quiet_ray()
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _init(address or os.environ.get("RAY_ADDRESS"))
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # ray.init puts its own in their place
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _init(address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    try:
        with _silenced_native_stderr():
            ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise UsageError(f"cannot reach {where}: {error}") from error


def generate(
    plan: Plan, ledger: Ledger, pending: Iterable[int], pools: Pools | None = None
) -> Iterator[Marker | FailedMarker]:
    """Make the pending shards; yields each one's marker, or failed marker, as it ends.

    ``pools`` are the actors to stream through and what each reserves; the layout's by default.

    Raises:
        StopJob: what a stage found that no other shard can escape.
    """
    job = Job(replace(plan, files=()), ledger.store.url)
    attempts = Attempts.remote()  # type: ignore[attr-defined]
    spans = make_spans(plan, pending)
    stream = _read(spans, plan)
    for actor, share in pools or _pools(plan):
        stream = stream.map_batches(
            actor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=share.min_replicas,
                max_size=share.max_replicas,
                max_concurrent_calls_per_actor=plan.spec.resources.shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            fn_constructor_args=(job, attempts),
        )
    for row in stream.iter_rows():
        yield _event(Frame(**row))


def _event(frame: Frame) -> Marker | FailedMarker:
    if frame.state == frames.COMMITTED:
        return parse_marker(frame.facts)
    facts = json.loads(frame.facts)
    if frame.state == frames.FAILED:
        return FailedMarker(**facts)
    kind = getattr(errors, facts["error"], None)
    if isinstance(kind, type) and issubclass(kind, StopJob):
        raise kind(facts["message"])
    raise StorageFailed(facts["message"])


def _read(spans: list[Span], plan: Plan) -> Dataset:
    """The first stage: one light task a span, each shard a block of its own."""
    DataContext.get_current().target_max_block_size = 1
    spec = plan.spec
    columns = read_columns(spec, [name for name, _ in plan.columns])

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        span = span_from_json(batch.column("span")[0].as_py())
        tries = 0
        while span.slices:
            try:
                for rows in read_span(span, spec, columns):
                    yield frames.from_rows(rows).to_block()
                    span = replace(span, slices=span.slices[1:])
                return
            except RetryShard as error:
                tries += 1
                if tries > spec.policy.shard_retries:
                    yield frames.stopped(span.slices[0].shard, error).to_block()
                    return
                time.sleep(BACKOFF_S * 2**tries)
            except StopJob as error:
                yield frames.stopped(span.slices[0].shard, error).to_block()
                return

    items = [{"span": span.to_json()} for span in spans]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS
    )


@dataclass(frozen=True)
class Job:
    """What an actor needs to know; small, since it is kept for the actor's restarts."""

    plan: Plan
    url: str


@ray.remote(num_cpus=0)
class Attempts:
    """Counts how often each stage began each shard, across the deaths of the actors that did."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, int], int] = {}

    def begin(self, stage: str, number: int) -> int:
        self._begun[stage, number] = self._begun.get((stage, number), 0) + 1
        return self._begun[stage, number]


class StageActor:
    """One replica: a frame in, a frame out, whatever happens.

    Row faults were turned into rejects further in. Here a fault that may pass is tried again, any
    other fails the shard, and one that no shard can escape is sent on to stop the job. SystemExit
    and KeyboardInterrupt are deliberately not caught: they end the actor, and Ray starts the shard
    again in another.
    """

    def __init__(self, job: Job, attempts: Any) -> None:
        import torch

        self.plan = job.plan
        self.ledger = Ledger(open_store(job.url))
        self.attempts = attempts
        self.device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        self.threads = job.plan.spec.resources.torch_threads
        self.broken: StopJob | None = None
        self.lock = threading.Lock()  # a stage works on one shard at a time
        torch.set_num_threads(self.threads)
        try:
            self.load()
        except StopJob as error:
            self.broken = error
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            self.broken = ModelError(f"the model cannot be loaded: {type(error).__name__}: {error}")

    def load(self) -> None:
        raise NotImplementedError

    def work(self, frame: Frame) -> Frame:
        raise NotImplementedError

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        torch.set_num_threads(self.threads)
        frame = frames.from_block(block)
        if frame.state in frames.FINAL:
            return block
        if self.broken is not None:
            return frames.stopped(frame.shard, self.broken).to_block()
        return self._persist(frame).to_block()

    def _persist(self, frame: Frame) -> Frame:
        """Try the shard until it is done or its attempts are used up."""
        limit = self.plan.spec.policy.shard_retries + 1
        while True:
            tries = ray.get(self.attempts.begin.remote(type(self).__name__, frame.shard))
            if tries > limit:
                lost = RetryShard(f"its worker process died in each of {limit} attempts")
                return self._fail(frame, lost, limit)
            try:
                return self.work(replace(frame, attempt=max(frame.attempt, tries)))
            except StopJob as error:
                return frames.stopped(frame.shard, error)
            except Exception as error:  # the wrapper's promise: one frame out per frame in
                if tries >= limit:
                    return self._fail(frame, error, tries)
                time.sleep(BACKOFF_S * 2**tries)

    def _fail(self, frame: Frame, error: BaseException, attempts: int) -> Frame:
        first, stop = self.plan.sample_range(frame.shard)
        failed = FailedMarker(
            shard=frame.shard,
            planned=stop - first,
            error=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            attempts=attempts,
            host=os.uname().nodename,
            failed_at=time.time(),
        )
        try:
            self.ledger.fail(failed)
        except (RetryShard, StopJob) as storage:
            return frames.stopped(frame.shard, StorageFailed(f"{storage} (after: {error})"))
        return Frame(frame.shard, frames.FAILED, attempts, failed.to_json())


class Generate(StageActor):
    """The fused layout: all stages in one actor."""

    def load(self) -> None:
        self.stages = shard.FusedStages(
            replicas.load_encoder(self.plan.model, self.plan.spec, self.device),
            replicas.load_denoiser(self.plan.model, self.plan.spec, self.device),
            replicas.load_decoder(self.plan.model, self.plan.spec, self.device),
        )

    def work(self, frame: Frame) -> Frame:
        marker = self.stages(frames.to_rows(frame), self.plan, self.ledger, frame.attempt)
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())


class Encode(StageActor):
    """Staged: rows in, conditions out."""

    def load(self) -> None:
        self.stage = replicas.load_encoder(self.plan.model, self.plan.spec, self.device)

    def work(self, frame: Frame) -> Frame:
        with self.lock:
            done, batches = shard.encode_shard(self.stage, frames.to_rows(frame), self.plan)
        tensors = wire.encoded_to_bytes(batches)
        return frames.from_work(done, frames.ENCODED, frame.attempt, tensors)


class Denoise(StageActor):
    """Staged: conditions in, latents out."""

    def load(self) -> None:
        self.stage = replicas.load_denoiser(self.plan.model, self.plan.spec, self.device)

    def work(self, frame: Frame) -> Frame:
        work = frames.to_work(frame)
        batches = wire.encoded_from_bytes(frame.tensors)
        with self.lock:
            latents = shard.denoise_shard(self.stage, work, batches)
        tensors = wire.latents_to_bytes(latents)
        return frames.from_work(work, frames.DENOISED, frame.attempt, tensors)


class Decode(StageActor):
    """Staged: latents in, committed images out."""

    def load(self) -> None:
        self.stage = replicas.load_decoder(self.plan.model, self.plan.spec, self.device)

    def work(self, frame: Frame) -> Frame:
        latents = wire.latents_from_bytes(frame.tensors)
        marker = shard.decode_shard(
            self.stage,
            self.lock,
            frames.to_work(frame),
            latents,
            self.plan,
            self.ledger,
            frame.attempt,
        )
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())


def _pools(plan: Plan) -> Pools:
    """The actors of the layout with what each reserves.

    Raises:
        UsageError: the smallest pools do not fit; says what was asked and what there is.
    """
    resources = plan.spec.resources
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    wanted: list[tuple[type[StageActor], Pool, float, float]]
    if resources.layout == "fused":
        wanted = [(Generate, resources.generate, 0.9, 1.0)]
    else:
        wanted = [
            (Encode, resources.encode, 0.1, 0.0),
            (Denoise, resources.denoise, 0.6, 0.9),
            (Decode, resources.decode, 0.2, 0.1),
        ]
    pools = []
    for actor, pool, cpu_share, gpu_share in wanted:
        many = actor in (Generate, Denoise)
        pools.append((actor, _share(pool, cpu_share, gpu_share, cpus, gpus, many)))
    _refuse_impossible([share for _, share in pools], cpus, gpus)
    return pools


Pools = Sequence[tuple[type[StageActor], Share]]


def _share(
    pool: Pool, cpu_share: float, gpu_share: float, cpus: float, gpus: float, many: bool
) -> Share:
    num_gpus = pool.num_gpus if pool.num_gpus is not None else (gpu_share if gpus else 0.0)
    default_cpus = cpu_share if not num_gpus else min(cpu_share, 0.5)
    num_cpus = pool.num_cpus if pool.num_cpus is not None else default_cpus
    fits = gpus // num_gpus if num_gpus else cpus
    most = pool.max_replicas or max(pool.min_replicas, int(fits) if many else 1, 1)
    return Share(pool.min_replicas, most, num_cpus, num_gpus)


def _refuse_impossible(shares: list[Share], cpus: float, gpus: float) -> None:
    asked_cpus = sum(share.min_replicas * share.num_cpus for share in shares)
    asked_gpus = sum(share.min_replicas * share.num_gpus for share in shares)
    if asked_cpus + READER_CPUS > cpus or asked_gpus > gpus:
        raise UsageError(
            f"the pools need at least {asked_cpus + READER_CPUS:g} CPUs and {asked_gpus:g} GPUs; "
            f"the cluster has {cpus:g} and {gpus:g}; lower min_replicas, num_cpus or num_gpus "
            "under resources"
        )


@contextmanager
def _silenced_native_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; failures come as exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_ray() -> None:
    """Keep Ray's own bars and log lines from burying ours; they stay in its session folder."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
