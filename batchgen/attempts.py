"""How often each shard was begun: what its replicas' deaths cannot make them forget.

It imports nothing, since the actor that holds the count would else load torch.
"""

from __future__ import annotations


class Attempts:
    """Counts how often each stage began each shard, across the deaths of the actors that did."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, int], int] = {}

    def begun(self, stage: str, number: int) -> int:
        return self._begun.get((stage, number), 0)

    def begin(self, stage: str, number: int) -> int:
        self._begun[stage, number] = self._begun.get((stage, number), 0) + 1
        return self._begun[stage, number]
