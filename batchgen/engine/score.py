"""The pool that scores a finished output: one frame is one committed shard of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from batchgen.attempts import Attempts, News
from batchgen.engine.actors import Job, StageActor
from batchgen.engine.memory import memory_facts
from batchgen.engine.pools import Pools, pools_of
from batchgen.engine.shared import SharedAttempts
from batchgen.engine.start import started
from batchgen.engine.stream import stream_of
from batchgen.errors import DoesNotFit, OutOfMemory, RetryShard
from batchgen.models.scorers import load_scorers
from batchgen.output.ledger import PLAN, Ledger
from batchgen.output.marker import Counts, Example, FailedMarker, Marker
from batchgen.output.score_set import ScoreSet, commit_scores, content_of, file_of, ledger_of
from batchgen.plain_text import short
from batchgen.plan.plan import Plan
from batchgen.progress.display import Progress
from batchgen.secrets import redact
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.images import environment
from batchgen.shard.rescore import rescore
from batchgen.shard.work import Trial
from batchgen.spec.score_section import ScorerSpec
from batchgen.spec.sections import Pool

UNSCORED = "not-scored"  # the reason of a sample that a scorer could not score


@dataclass(frozen=True)
class ScoreJob(Job):
    """The arguments of the actors. ``plan`` has the resources of the scoring, and no files.

    Attributes:
        record: of the score set.
        specs: its scorers, settled.
    """

    record: ScoreSet
    specs: tuple[ScorerSpec, ...]


class Score(StageActor):
    """Scores shards: their images are read from the output, their scores are committed to the set.

    ``ledger`` is that of the score set, ``output`` that of the output.
    """

    def __init__(self, job: ScoreJob, attempts: Attempts | SharedAttempts) -> None:
        self.record, self.specs = job.record, job.specs
        super().__init__(job, attempts)

    @property
    def pool(self) -> Pool:
        return self.plan.spec.resources.generate

    def load(self) -> None:
        self.output = self.ledger
        self.ledger = ledger_of(self.output, self.record.name)
        self.parts: Mapping[str, Plan] = {one.fingerprint: one for one in self.output.parts()}
        self.scorers = load_scorers(self.specs, self.devices[0])

    def work(self, frame: Frame, trial: Trial) -> Frame:
        source = self.output.marker(frame.shard)
        plan = self.parts.get(frame.facts.decode())
        if source is None or plan is None:
            raise RetryShard(f"shard {frame.shard} of the output was withdrawn meanwhile")
        found = rescore(self.scorers, self.output, plan, source, trial)
        count, failed = source.counts.accepted, len(found.failed)
        reasons = {UNSCORED: failed} if failed else {}
        first = next(iter(sorted(found.failed.items())), None)
        told = Marker(
            shard=frame.shard,
            counts=Counts(count, count - failed, 0, failed),
            files=(),
            spec_fingerprint=self.record.fingerprint,
            plan_fingerprint=source.plan_fingerprint,
            reasons=reasons,
            examples={UNSCORED: Example(first[0], short(redact(first[1])))} if first else {},
            timings_s=found.timings_s,
            attempt=frame.attempt,
            environment=environment(self.devices[0]),
            finished_at=time.time(),
        )
        marker = commit_scores(self.output, self.record, source, found.table, told)
        return Frame(frame.shard, frames.COMMITTED, frame.attempt, marker.to_json())

    def committed(self, number: int) -> Marker | None:
        source, marker = self.output.marker(number), self.ledger.marker(number)
        if source is None or marker is None:
            return None
        name = file_of(self.record.name, number, content_of(source))
        return marker if [file.name for file in marker.files] == [name] else None

    def samples_of(self, number: int) -> int:
        source = self.output.marker(number)
        return 0 if source is None else source.counts.accepted

    def _ran_out(self, number: int, error: OutOfMemory, tried: int | None) -> Frame | None:
        stopped = super()._ran_out(number, error, tried)
        if stopped is None:
            return None
        sizes = ", ".join(f"{one.scorer} {one.batch_size}" for one in self.specs)
        lack = DoesNotFit(
            f"too little memory to score{memory_facts(self.devices[0])}: {error}; score under "
            f"another name with a smaller batch_size of the scorers (now {sizes}), for example "
            '--scorer "{scorer: clip, batch_size: 1}"'
        )
        return frames.stopped(number, lack)


@contextmanager
def score_pools(
    plan: Plan,
    ledger: Ledger,
    shards: int,
    address: str | None,
    progress: Progress,
    interrupt: Callable[[str], None],
) -> Iterator[Pools]:
    """The pool that scores ``shards`` shards, see ``started``."""

    def pools(nodes_may_join: bool) -> Pools:
        return [(Score, one) for _, one in pools_of(plan, shards, nodes_may_join)]

    paths = [ledger.store.path(PLAN)] if ledger.store.local else []
    with started(plan, pools, paths, "the scorers", address, progress, interrupt) as found:
        yield found


def score_stream(
    job: ScoreJob,
    shards: Sequence[tuple[Plan, Marker]],
    pools: Pools,
    hear: Callable[[News], None] | None = None,
) -> Generator[Marker | FailedMarker, None, None]:
    """Score these shards; yields the marker or failed marker of each one as it ends."""
    items = [
        Frame(marker.shard, frames.ROWS, 0, plan.fingerprint.encode()) for plan, marker in shards
    ]
    yield from stream_of(items, pools, job.plan.spec.resources.shards_in_flight, job, hear)
