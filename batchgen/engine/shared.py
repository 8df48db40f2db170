"""Shares one record of attempts among all actors of a run; the record has its own actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchgen.attempts import Attempt, Attempts, News
from batchgen.cluster.join import this_node

HEAR_WITHIN_S = 10.0


class SharedAttempts:
    """A client of the actor that holds a run's ``Attempts``, for its replicas and its driver."""

    def __init__(self, asked: Mapping[str, int]) -> None:
        """Starts the holder on this node, the driver's: it would lose the record with its node."""
        here = NodeAffinitySchedulingStrategy(this_node(), soft=False)
        # No CPU, so that it can start and restart even if replicas have reserved all CPUs.
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        kind = ray.remote(Attempts).options(**lasting, scheduling_strategy=here)
        self._holder = kind.remote(asked)
        self._heard = 0

    def begin_first(self, stage: str, number: int, node: str) -> bool:
        return bool(self._ask("begin_first", stage, number, node))

    def begin(self, stage: str, number: int, node: str) -> None:
        self._ask("begin", stage, number, node)

    def past(self, stage: str, number: int) -> list[Attempt]:
        return list(self._ask("past", stage, number))

    def tell(
        self, stage: str, number: int, on: tuple[str, ...] | None, error: str | None = None
    ) -> None:
        self._ask("tell", stage, number, on, error)

    def load_begins(self, stage: str, replica: str) -> None:
        self._ask("load_begins", stage, replica)

    def load_ends(self, stage: str, replica: str, loaded: bool) -> None:
        self._ask("load_ends", stage, replica, loaded)

    def may_load(self, stage: str) -> bool | None:
        found: bool | None = self._ask("may_load", stage)
        return found

    def say(self, words: str) -> None:
        self._ask("say", words)

    def made(self, number: int, samples: int) -> None:
        """Sent without waiting for an answer: only the display uses it, so it may be lost."""
        with suppress(ray.exceptions.RayError):
            self._holder.made.remote(number, samples)

    def news(self, ended: Sequence[int] = ()) -> News:
        """News of the replicas since the last call.

        Raises:
            RayError: no answer within HEAR_WITHIN_S seconds.
        """
        asked = self._holder.news.remote(self._heard, ended)
        news: News = ray.get(asked, timeout=HEAR_WITHIN_S)
        self._heard += len(news.said)
        return news

    def end(self) -> None:
        """Stop the holder: otherwise it lives until Ray ends, which other runs may share."""
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._holder)

    def _ask(self, method: str, *words: Any) -> Any:
        return ray.get(getattr(self._holder, method).remote(*words))
