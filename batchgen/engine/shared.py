"""The record of attempts that all actors of a run share, held by an actor of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchgen.attempts import Attempt, Attempts
from batchgen.engine.cluster import this_node

HEAR_EVERY_S = 2.0


class SharedAttempts:
    """``Attempts``, as the actors of a run and its driver call them from their processes."""

    def __init__(self, asked: Mapping[str, int]) -> None:
        """Its holder is on this node: another one's loss would make it forget."""
        here = NodeAffinitySchedulingStrategy(this_node(), soft=False)
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        kind = ray.remote(Attempts).options(**lasting, scheduling_strategy=here)
        self._holder = kind.remote(asked)
        self._heard, self._heard_at = 0, 0.0

    def begin_first(self, stage: str, number: int, node: str) -> bool:
        return bool(self._ask("begin_first", stage, number, node))

    def begin(self, stage: str, number: int, node: str) -> None:
        self._ask("begin", stage, number, node)

    def past(self, stage: str, number: int) -> list[Attempt]:
        return list(self._ask("past", stage, number))

    def tell(self, stage: str, number: int, on: tuple[str, ...], error: str | None = None) -> None:
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

    def news(self) -> list[str]:
        """What replicas have to say since it was last asked; empty if that was just now."""
        if time.monotonic() - self._heard_at < HEAR_EVERY_S:
            return []
        said: list[str] = self._ask("said", self._heard)
        self._heard, self._heard_at = self._heard + len(said), time.monotonic()
        return said

    def _ask(self, method: str, *words: Any) -> Any:
        return ray.get(getattr(self._holder, method).remote(*words))
