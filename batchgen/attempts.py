"""Records every attempt to process a shard or load a model, and decides whether to try again.

The record is kept in its own actor, so it survives the crash of a replica. Keep the imports light:
that actor must not load torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

MOST_LEFT_OUT = 3  # samples left out of a shard before the shard itself fails
DIED = "its worker process died"
SILENT_FOR_S = 3600.0  # a stage that begins no shard for this long has no working replica
STARTED_WITHIN_S = 60.0  # a stage's other replicas begin to load within this time of its first


@dataclass(slots=True)
class Stage:
    """Whether the replicas of a stage could load their model.

    Attributes:
        loading, loaded, refused: replicas by the state of their last attempt to load the model.
        begun_at: when the first replica began to load.
        heard_at: when a replica last appeared, loaded the model or began a shard.
    """

    loading: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    begun_at: float = field(default_factory=time.monotonic)
    heard_at: float = 0.0

    def put(self, replica: str, into: set[str]) -> None:
        known = self.loading | self.loaded | self.refused
        if replica not in known or into is self.loaded:
            self.heard_at = time.monotonic()
        for one in (self.loading, self.loaded, self.refused):
            one.discard(replica)
        into.add(replica)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a shard in a stage.

    Attributes:
        node: the id of the node it ran on.
        on: the keys of the samples it last worked on. Empty if it was between samples, None if it
            did not report them (a first attempt does not, to save the calls) or if the attempt
            tells nothing about the shard (the replica ran out of memory).
        error: the error it ended with; None while it runs, and if its process died.
    """

    node: str
    on: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What the driver displays while it waits for shards.

    Attributes:
        said: lines for the user.
        under_way: unfinished shard -> number of its samples generated so far.
        began_before_s: seconds since the first shard was begun; None before that.
    """

    said: Sequence[str] = ()
    under_way: Mapping[int, int] = field(default_factory=dict)
    began_before_s: float | None = None


class Attempts:
    """Records the attempts of every stage, at shards and at loading its model."""

    def __init__(self, asked: Mapping[str, int] | None = None) -> None:
        """``asked``: stage -> number of replicas started at the beginning."""
        self._asked = asked or {}
        self._past: dict[tuple[str, int], list[Attempt]] = {}
        self._stages: dict[str, Stage] = {}
        self._said: list[str] = []
        self._under_way: dict[int, int] = {}
        self._first_at: float | None = None  # when the first shard was begun

    def begin_first(self, stage: str, number: int, node: str) -> bool:
        """Record the first attempt; returns False and records nothing if there was one before."""
        now = self._stage(stage).heard_at = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        if (stage, number) in self._past:
            return False
        self._past[stage, number] = [Attempt(node)]
        return True

    def begin(self, stage: str, number: int, node: str) -> None:
        self._stage(stage).heard_at = time.monotonic()
        self._past.setdefault((stage, number), []).append(Attempt(node, on=()))

    def past(self, stage: str, number: int) -> list[Attempt]:
        return list(self._past.get((stage, number), ()))

    def tell(
        self, stage: str, number: int, on: tuple[str, ...] | None, error: str | None = None
    ) -> None:
        """Record the samples that the last attempt works on, and the error if it ended with one.

        With ``on`` None, its end tells nothing about the samples or the shard.

        The attempt may be unknown here: if the process that holds this record dies, Ray restarts
        it with an empty record, and no shard may be lost because of that.
        """
        past = self._past.setdefault((stage, number), [Attempt("")])
        past[-1] = replace(past[-1], on=on, error=error)

    def load_begins(self, stage: str, replica: str) -> None:
        known = self._stage(stage)
        known.put(replica, known.loading)

    def load_ends(self, stage: str, replica: str, loaded: bool) -> None:
        known = self._stage(stage)
        known.put(replica, known.loaded if loaded else known.refused)

    def may_load(self, stage: str) -> bool | None:
        """Whether a replica that could not load the model should try again.

        True once another replica of the stage has loaded the same model: then the fault is local
        to a node and may pass. False if no replica could load it, or if the stage has been silent
        for SILENT_FOR_S. None while that is unknown, because others are at their first attempt.
        """
        known, now = self._stage(stage), time.monotonic()
        if now - known.heard_at > SILENT_FOR_S:
            return False
        if known.loaded:
            return True
        missing = len(known.refused) < self._asked.get(stage, 1)
        others_come = missing and now - known.begun_at < STARTED_WITHIN_S
        return None if known.loading or others_come else False

    def say(self, words: str) -> None:
        """Leave a line for the user; a repeated line is kept once."""
        if words not in self._said:
            self._said.append(words)

    def made(self, number: int, samples: int) -> None:
        """Record how many samples of a shard its present attempt has generated."""
        self._under_way[number] = samples

    def news(self, heard: int, ended: Sequence[int] = ()) -> News:
        """News for the user after the first ``heard`` lines, without the shards that ``ended``."""
        for number in ended:
            self._under_way.pop(number, None)
        since = None if self._first_at is None else time.monotonic() - self._first_at
        return News(self._said[heard:], dict(self._under_way), since)

    def _stage(self, stage: str) -> Stage:
        return self._stages.setdefault(stage, Stage())


@dataclass(frozen=True)
class Judgement:
    """How to make the next attempt at a shard, judged by its past attempts.

    Attributes:
        begun: number of attempts so far.
        tries: those that count. Attempts that were lost with their node do not: the loss says
            nothing about the shard.
        alone: keys of the samples that each get a micro-batch of their own.
        without: key -> error, for the samples that were found to crash the shard.
        hopeless: why there should be no further attempt, or None.
    """

    begun: int = 0
    tries: int = 0
    alone: frozenset[str] = frozenset()
    without: Mapping[str, str] = field(default_factory=dict)
    hopeless: str | None = None


def judge(past: Sequence[Attempt], limit: int, living: Collection[str]) -> Judgement:
    """Narrow a shard's failures down to the samples that cause them.

    The first ``limit - 1`` attempts may have failed for any reason. From attempt ``limit`` on, the
    samples of the micro-batch in which an attempt ended are suspects: the next attempt processes
    them one by one, and a sample that ends that attempt too is left out of all later ones. The
    shard fails if an attempt ends between samples, or after MOST_LEFT_OUT samples were left out.
    """
    counted = [one for one in past if one.error is not None or one.node in living]
    alone: set[str] = set()
    without: dict[str, str] = {}
    hopeless = None
    for number, attempt in enumerate(counted, 1):
        if number < limit or attempt.on is None:
            continue
        why = attempt.error or DIED
        suspects = set(attempt.on)
        if not suspects or len(without) >= MOST_LEFT_OUT:
            each = "" if attempt.error else f" in each of {number} attempts"
            hopeless = f"{why}{each}"
        elif len(suspects) == 1 or suspects <= alone:
            without.update(dict.fromkeys(attempt.on, why))
        else:
            alone |= suspects
    return Judgement(len(past), len(counted), frozenset(alone), without, hopeless)
