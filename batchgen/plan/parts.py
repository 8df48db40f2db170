"""The plans of an output as one: its parts, whose shards are numbered through."""

from __future__ import annotations

import bisect
from functools import cached_property

from batchgen.plan.plan import Plan
from batchgen.spec.spec import Spec


class Parts(tuple[Plan, ...]):
    """The parts of an output, in order; at least one. Part 0 is the plan of its first run.

    It answers what a plan answers about the shards and samples of the complete output, so that
    ``Plan | Parts`` can be asked by whoever counts.
    """

    @property
    def spec(self) -> Spec:
        """The spec of the first part, as the user gave it."""
        return self[0].spec

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(self)

    @property
    def samples(self) -> int:
        return sum(plan.samples for plan in self)

    @property
    def shards(self) -> int:
        return self.numbers.stop

    @property
    def numbers(self) -> range:
        """The numbers of all shards."""
        return range(self[-1].numbers.stop)

    @property
    def fingerprint(self) -> str:
        """That of the last part, which covers those before it."""
        return self[-1].fingerprint

    def of(self, shard: int) -> Plan:
        """The part that has the shard."""
        return self[bisect.bisect_right(self._first_shards, shard) - 1]

    def samples_of(self, shard: int) -> int:
        """The number of samples of the shard."""
        return self.of(shard).samples_of(shard)

    def samples_in(self, numbers: range) -> int:
        """The number of samples of these shards."""
        return sum(plan.samples_in(numbers) for plan in self)

    @cached_property
    def _first_shards(self) -> list[int]:
        return [plan.numbers.start for plan in self]


Planned = Plan | Parts


def planned_twice(parts: Parts) -> str:
    """A message if two parts plan the same sample of a row; empty if none do."""
    for number, one in enumerate(parts):
        for other in parts[:number]:
            if one.place.base == other.place.base and _overlap(one, other):
                places = f"{other.place.part} and {one.place.part}"
                return f"parts {places} of the plan have a sample in common"
    return ""


def _overlap(one: Plan, other: Plan) -> bool:
    """Whether two parts of the same input have a (row, variant) in common."""
    if not one.place.listed and not other.place.listed:
        return _meet(_rows(one), _rows(other)) and _meet(_variants(one), _variants(other))
    if not one.place.listed:
        one, other = other, one
    pairs = zip(one.listed.rows.tolist(), one.listed.variants.tolist(), strict=True)
    return any(other.sample_at(row, variant) is not None for row, variant in pairs)


def _rows(plan: Plan) -> range:
    return range(plan.place.first_row, plan.place.first_row + plan.rows)


def _variants(plan: Plan) -> range:
    return range(plan.place.first_variant, plan.place.first_variant + plan.spec.variants)


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
