"""The actors of the pools: each holds one replica and returns one frame for every frame it gets."""

from __future__ import annotations

import os
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchgen import models
from batchgen.attempts import Attempts, Judgement, judge
from batchgen.cluster.devices import devices
from batchgen.cluster.join import living_nodes, this_actor, this_node
from batchgen.engine.loading import import_libraries, load_model
from batchgen.engine.memory import Memory, load_hint
from batchgen.engine.scoring import scorers_of
from batchgen.engine.shared import SharedAttempts
from batchgen.engine.warm_up import compile_before
from batchgen.engine.watch import Watch
from batchgen.errors import OutOfMemory, RetryShard, StopJob, StorageFailed
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker
from batchgen.plan.plan import Plan
from batchgen.secrets import redact
from batchgen.shard import frames, stages
from batchgen.shard.device import Device
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.spec.sections import Pool
from batchgen.stages.out_of_memory import is_out_of_memory
from batchgen.storage import configure, open_store

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class Job:
    """An actor's arguments. Small, because Ray keeps them to restart the actor."""

    plan: Plan
    url: str
    started_at: float


def pause(tries: int) -> None:
    time.sleep(min(MAX_BACKOFF_S, BACKOFF_S * 2**tries))


class Turns:
    """A lock for an actor's threads: several shards at a time, or one exclusively.

    A shard that was attempted before may be the one that crashes its actor. From then on it runs
    exclusively, so that its crashes are not counted as attempts of other shards.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._working = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: not self._alone)
            self._working += 1
        try:
            yield
        finally:
            with self._turn:
                self._working -= 1
                self._turn.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: not self._alone)
            self._alone = True  # from here on no other thread starts
            self._turn.wait_for(lambda: self._working == 0)
        try:
            yield
        finally:
            with self._turn:
                self._alone = False
                self._turn.notify_all()


class StageActor(ABC):
    """One replica: one frame in, one frame out, whatever happens.

    Errors of single rows have become rejects further inside. Here a transient error is retried,
    any other error fails the shard, and an error that would hit every shard is sent on to stop the
    job. A lack of memory is never blamed on samples (``Memory``). SystemExit and KeyboardInterrupt
    are deliberately not caught: they end the actor, and Ray runs the shard in another one.
    """

    def __init__(self, job: Job, attempts: Attempts | SharedAttempts) -> None:
        self.plan = job.plan
        self.started_at = job.started_at
        self.attempts = attempts
        self.name = type(self).__name__
        self.node = this_node()
        self.turns = Turns()
        self.watch = Watch(self.pool.stuck_after_s)
        self._told_at = 0.0
        self.url = job.url
        self.broken = load_model(self._load, attempts, self.name, this_actor(), self._load_hint)

    def _load_hint(self) -> str:
        return load_hint(self.plan.spec.resources, self.devices[0])

    def _load(self) -> None:
        self.devices = devices()
        configure(self.plan.spec.storage_options, self.plan.spec.storage.limits())
        self.ledger = Ledger(open_store(self.url).in_place())
        self.device = Device(self.devices[0])
        self.memory = Memory(self.plan.spec.resources, self.devices[0])
        with self.watch:
            self.load()
            where = f"a replica of the {self.name.lower()} pool on {os.uname().nodename}"
            if told := compile_before(self.plan, where, self.held):
                self.attempts.say(told)

    @property
    @abstractmethod
    def pool(self) -> Pool:
        """The spec's section about this stage's replicas."""

    @abstractmethod
    def load(self) -> None:
        """Build the stages that this replica holds."""

    def held(self) -> Mapping[str, Any]:
        """The stages that this replica holds and may compile, by name."""
        return {}

    @abstractmethod
    def work(self, frame: Frame, trial: Trial) -> Frame:
        """Run this stage on one shard."""

    def __call__(self, block: pa.Table) -> pa.Table:
        frame = frames.from_block(block)
        if frame.state in frames.FINAL:
            return block
        if self.broken is not None:
            return frames.stopped(frame.shard, self.broken).to_block()
        try:
            return self._persist(frame).to_block()
        except Exception as error:  # raised here it would end the stream: one frame out per frame
            return frames.stopped(frame.shard, error).to_block()

    def _persist(self, frame: Frame) -> Frame:
        """Retry the shard until it ends, or until its attempts show that retrying is useless."""
        with self.turns.shared():
            if self.attempts.begin_first(self.name, frame.shard, self.node):
                done = self._try(frame, Judgement(), tell=False)
                if done is not None:
                    return done
                pause(1)
        while True:
            settled = self._settled(frame.shard)
            if settled is not None:
                return settled
            with self.turns.alone():
                judged = self._judged(frame.shard)
                if judged.hopeless is not None:
                    return self._fail(frame, RetryShard(judged.hopeless), judged.tries)
                self.memory.free()
                self.attempts.begin(self.name, frame.shard, self.node)
                done = self._try(frame, judged, tell=True)
                if done is not None:
                    return done
            pause(judged.tries + 1)

    def _try(self, frame: Frame, judged: Judgement, tell: bool) -> Frame | None:
        """One attempt; returns None if there may be another.

        With ``tell`` the keys of each micro-batch are recorded before it starts: after a crash
        this process cannot report which samples it was working on.
        """
        on: tuple[str, ...] = ()

        def working_on(keys: Iterable[str]) -> None:
            nonlocal on
            on = tuple(keys)
            self.watch.progress()
            if tell:
                self.attempts.tell(self.name, frame.shard, on)

        done = 0

        def made(samples: int) -> None:
            nonlocal done
            done += samples
            self._tell_made(frame.shard, done)

        number = max(frame.attempt, judged.begun + 1)
        trial = Trial(
            judged.alone,
            judged.without,
            working_on,
            made,
            careful=tell,
            decode_batch_size=self.memory.decode_batch_size,
        )
        try:
            with self.watch:
                return self.work(replace(frame, attempt=number), trial)
        except StopJob as error:
            return frames.stopped(frame.shard, error)
        except OutOfMemory as error:
            return self._ran_out(frame.shard, error, trial.decode_batch_size)
        except Exception as error:
            kind = type(error).__name__
            is_memory = is_out_of_memory(error)
            if kind == "AcceleratorError" and not is_memory:
                os._exit(1)  # after such an error CUDA works only in a new process
            if isinstance(error, RetryShard) or is_memory:
                on = ()  # not caused by a sample, so none becomes a suspect
            self.attempts.tell(self.name, frame.shard, on, redact(f"{kind}: {error}"))
            judged = self._judged(frame.shard)
            return self._fail(frame, error, judged.tries) if judged.hopeless is not None else None

    def _ran_out(self, number: int, error: OutOfMemory, tried: int | None) -> Frame | None:
        """A stage ran out of memory; returns None if there may be another attempt.

        The attempt is recorded as one that tells nothing about the shard, so ``judge`` neither
        suspects a sample nor fails the shard for it; ``Memory`` limits their number.
        """
        self.attempts.tell(self.name, number, None, redact(f"{type(error).__name__}: {error}"))
        before = self.memory.decode_batch_size
        does_not_fit = self.memory.ran_out(number, error, tried)
        if self.memory.decode_batch_size != before:
            self.attempts.say(
                f"a replica of the {self.name.lower()} pool on {os.uname().nodename} has too "
                f"little memory to decode {self.plan.spec.resources.decode_size} images at a time; "
                "from now on it decodes them one by one, and the markers say so"
            )
        return None if does_not_fit is None else frames.stopped(number, does_not_fit)

    def _tell_made(self, number: int, samples: int) -> None:
        """Report progress to the display, at most every TELL_EVERY_S seconds."""
        now = time.monotonic()
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            self.attempts.made(number, samples)

    def _judged(self, number: int) -> Judgement:
        limit = self.plan.spec.policy.shard_retries + 1
        return judge(self.attempts.past(self.name, number), limit, living_nodes())

    def _settled(self, number: int) -> Frame | None:
        """The shard's result, if it ended in this run but its actor died before returning it."""
        marker = self.committed(number)
        if marker is not None:
            return Frame(number, frames.COMMITTED, marker.attempt, marker.to_json())
        for failed in self.ledger.failures([number]):
            if failed.failed_at >= self.started_at:
                return Frame(number, frames.FAILED, failed.attempts, failed.to_json())
        return None

    def committed(self, number: int) -> Marker | None:
        """The shard's marker, if it is committed."""
        return self.ledger.committed(self.plan, number)

    def samples_of(self, number: int) -> int:
        """How many samples the shard has."""
        first, stop = self.plan.sample_range(number)
        return stop - first

    def _fail(self, frame: Frame, error: BaseException, attempts: int) -> Frame:
        failed = FailedMarker(
            shard=frame.shard,
            planned=self.samples_of(frame.shard),
            error=type(error).__name__,
            message=redact(str(error)),
            traceback=redact("".join(traceback.format_exception(error))),
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

    @property
    def pool(self) -> Pool:
        return self.plan.spec.resources.generate

    def load(self) -> None:
        import_libraries()
        self.stages = stages.FusedStages(
            models.load_encoder(self.plan.model, self.plan.spec, self.devices),
            models.load_denoiser(self.plan.model, self.plan.spec, self.devices),
            models.load_decoder(self.plan.model, self.plan.spec, self.devices),
            self.devices[0],
            scorers_of(self.plan, self.devices[0]),
        )

    def held(self) -> Mapping[str, Any]:
        fused = self.stages
        return {"encode": fused.encoder, "denoise": fused.denoiser, "decode": fused.decoder}

    def work(self, frame: Frame, trial: Trial) -> Frame:
        rows = frames.to_rows(frame)
        marker = self.stages(rows, self.plan, self.ledger, frame.attempt, trial)
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())


class Encode(StageActor):
    """Staged: rows in, conditions out."""

    @property
    def pool(self) -> Pool:
        return self.plan.spec.resources.encode

    def load(self) -> None:
        import_libraries()
        self.stage = models.load_encoder(self.plan.model, self.plan.spec, self.devices)

    def work(self, frame: Frame, trial: Trial) -> Frame:
        # Imported here because it imports torch, which the driver and the readers do not need.
        from batchgen.shard import tensor_bytes

        rows = frames.to_rows(frame)
        work, batches = stages.encode_shard(self.stage, self.device, rows, self.plan, trial)
        tensors = tensor_bytes.encoded_to_bytes(batches)
        return frames.from_work(work, frames.ENCODED, frame.attempt, tensors)


class Denoise(StageActor):
    """Staged: conditions in, latents out."""

    @property
    def pool(self) -> Pool:
        return self.plan.spec.resources.denoise

    def load(self) -> None:
        import_libraries()
        self.stage = models.load_denoiser(self.plan.model, self.plan.spec, self.devices)

    def held(self) -> Mapping[str, Any]:
        return {"denoise": self.stage}

    def work(self, frame: Frame, trial: Trial) -> Frame:
        from batchgen.shard import tensor_bytes

        encoded = tensor_bytes.encoded_from_bytes(frame.tensors)
        before = frames.to_work(frame)
        work, latents = stages.denoise_shard(self.stage, self.device, before, encoded, trial)
        tensors = tensor_bytes.latents_to_bytes(latents)
        return frames.from_work(work, frames.DENOISED, frame.attempt, tensors)


class Decode(StageActor):
    """Staged: latents in, committed images out."""

    @property
    def pool(self) -> Pool:
        return self.plan.spec.resources.decode

    def load(self) -> None:
        import_libraries()
        self.stage = models.load_decoder(self.plan.model, self.plan.spec, self.devices)
        self.scorers = scorers_of(self.plan, self.devices[0])

    def held(self) -> Mapping[str, Any]:
        return {"decode": self.stage}

    def work(self, frame: Frame, trial: Trial) -> Frame:
        from batchgen.shard import tensor_bytes

        latents = tensor_bytes.latents_from_bytes(frame.tensors)
        marker = stages.decode_shard(
            self.stage,
            self.device,
            frames.to_work(frame),
            latents,
            self.plan,
            self.ledger,
            frame.attempt,
            trial,
            self.scorers,
        )
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())
