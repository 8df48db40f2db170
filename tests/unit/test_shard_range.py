"""Ranges of shards as text: `--shards A:B`."""

from __future__ import annotations

import pytest

from batchgen.errors import SpecError
from batchgen.output.shard_range import parse_range
from tests.datasets_on_disk import paper_plan


@pytest.mark.parametrize(
    ("text", "part"),
    [("0:2", (0, 2)), (":2", (0, 2)), ("3:", (3, 5)), (":", (0, 5)), ("4:5", (4, 5))],
)
def test_parts_are_read(text: str, part: tuple[int, int]) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    assert parse_range(text, plan.shards) == part
    assert parse_range(None, plan.shards) is None


@pytest.mark.parametrize("text", ["3", "2:2", "3:2", "0:6", "-1:2", "a:b", "1:2:3", ""])
def test_what_is_no_part_of_the_plan_is_refused(text: str) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    with pytest.raises(SpecError, match=r"--shards: got .* 0 <= A < B <= 5"):
        parse_range(text, plan.shards)
