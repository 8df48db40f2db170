"""Parses the range of an output's shards that one run generates while other runs do the rest."""

from __future__ import annotations

from batchgen.errors import SpecError

ShardRange = tuple[int, int]  # the first shard, and the one after the last


def range_text(shards: ShardRange) -> str:
    return f"{shards[0]}:{shards[1]}"


def parse_range(text: str | None, shards: int) -> ShardRange | None:
    """The range that "A:B", "A:" or ":B" names; None for all shards.

    Raises:
        SpecError: the text has another form, or the plan does not have these shards.
    """
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    allowed = f"A:B with 0 <= A < B <= {shards}, the shards of the plan"
    try:
        found = (int(first or 0), int(stop or shards))
    except ValueError as error:
        raise SpecError("--shards", text, allowed) from error
    if not colon or not 0 <= found[0] < found[1] <= shards:
        raise SpecError("--shards", text, allowed)
    return found
