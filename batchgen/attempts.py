"""How often each shard was begun and each model loaded, and what became of it.

No replica's death makes it forgotten.

It imports nothing heavy, since the actor that holds the record would else load torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

MOST_LEFT_OUT = 3  # samples of a shard that are left out before the shard itself is given up
DIED = "its worker process died"
SILENT_FOR_S = 3600.0  # a stage in which no shard was begun for so long has no replica at work
STARTED_WITHIN_S = 60.0  # after a stage's first replica the others that were asked for load as well


@dataclass(slots=True)
class Stage:
    """How the replicas of a stage fare with their model.

    Attributes:
        loading, loaded, refused: replicas, by how their last attempt to load it ended.
        begun_at: when the first of them began.
        heard_at: when a replica was first heard of, has loaded, or has begun a shard.
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
    """One begin of a shard in a stage.

    Attributes:
        node: the id of the node it ran on.
        on: the keys of the samples that were last worked on; empty while nothing particular was,
            None where nobody was told (a first attempt saves itself the telling).
        error: what it ended with; None while it runs, and for ever if its process died.
    """

    node: str
    on: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What the driver is told while it waits for shards; for the display alone.

    Attributes:
        said: lines for the user.
        under_way: shard -> samples made of it so far, of shards that are not finished.
        began_before_s: how long ago the first shard was begun; None while none was.
    """

    said: Sequence[str] = ()
    under_way: Mapping[int, int] = field(default_factory=dict)
    began_before_s: float | None = None


class Attempts:
    """Records attempts of every stage, at shards and at its model, across the deaths of actors."""

    def __init__(self, asked: Mapping[str, int] | None = None) -> None:
        """``asked``: stage -> replicas that are started at once."""
        self._asked = asked or {}
        self._past: dict[tuple[str, int], list[Attempt]] = {}
        self._stages: dict[str, Stage] = {}
        self._said: list[str] = []
        self._under_way: dict[int, int] = {}
        self._first_at: float | None = None  # when the first shard was begun

    def begin_first(self, stage: str, number: int, node: str) -> bool:
        """Record the first attempt; False, and nothing recorded, if there was one before."""
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

    def tell(self, stage: str, number: int, on: tuple[str, ...], error: str | None = None) -> None:
        """What the last attempt works on; with an error, what it ended on.

        The attempt may be unknown here: this record is begun anew where the process that holds it
        dies, and no shard is to be lost for that.
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
        """Whether another attempt of a replica that was refused has a chance.

        None while it is open: others are at their first. True once one of the stage has loaded
        the same model: then it is a node's fault, and may pass. False where all were refused, or
        where the stage has been silent for SILENT_FOR_S.
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
        """Leave a line for the user; once, however often it is said."""
        if words not in self._said:
            self._said.append(words)

    def made(self, number: int, samples: int) -> None:
        """So many samples of a shard are made, in its present attempt."""
        self._under_way[number] = samples

    def news(self, heard: int, ended: Sequence[int] = ()) -> News:
        """What is to be told to the user, beyond the first ``heard`` lines; ``ended`` shards are
        told of no more."""
        for number in ended:
            self._under_way.pop(number, None)
        since = None if self._first_at is None else time.monotonic() - self._first_at
        return News(self._said[heard:], dict(self._under_way), since)

    def _stage(self, stage: str) -> Stage:
        return self._stages.setdefault(stage, Stage())


@dataclass(frozen=True)
class Judgement:
    """What the past attempts at a shard say about the next one.

    Attributes:
        begun: attempts so far.
        tries: those that count. What went with its node does not: it was taken away, and that says
            nothing about the shard.
        alone: keys of samples to be worked on each in a micro-batch of its own.
        without: key -> why, for the samples that have been found to fail the shard.
        hopeless: why no further attempt is to be made, or None.
    """

    begun: int = 0
    tries: int = 0
    alone: frozenset[str] = frozenset()
    without: Mapping[str, str] = field(default_factory=dict)
    hopeless: str | None = None


def judge(past: Sequence[Attempt], limit: int, living: Collection[str]) -> Judgement:
    """Narrow a shard's failures down to the samples that cause them.

    Up to ``limit`` attempts anything may have been the cause. From the last of them on, the
    micro-batch that an attempt ended on is suspected: its samples are worked on one by one in the
    next attempt, and one that ends that attempt as well is left out of those that follow. Where an
    attempt ended on nothing particular, or after MOST_LEFT_OUT samples, the shard is given up.
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
