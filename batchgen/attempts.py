"""How often each shard was begun, and what became of it: what no replica's death makes forgotten.

It imports nothing heavy, since the actor that holds the record would else load torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

MOST_LEFT_OUT = 3  # samples of a shard that are left out before the shard itself is given up
DIED = "its worker process died"


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


class Attempts:
    """Records every attempt of every stage at every shard, across the deaths of the actors."""

    def __init__(self) -> None:
        self._past: dict[tuple[str, int], list[Attempt]] = {}

    def begin_first(self, stage: str, number: int, node: str) -> bool:
        """Record the first attempt; False, and nothing recorded, if there was one before."""
        if (stage, number) in self._past:
            return False
        self._past[stage, number] = [Attempt(node)]
        return True

    def begin(self, stage: str, number: int, node: str) -> None:
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
