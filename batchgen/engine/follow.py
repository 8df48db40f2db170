"""Follows a stream of shards: counts and shows each one as it ends, and stops a hopeless run."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from batchgen.output.lease import Lease
from batchgen.output.marker import FailedMarker, Marker
from batchgen.output.outcome import count
from batchgen.output.tally import Tally
from batchgen.progress.display import Progress
from batchgen.progress.lines import line_of


def follow(
    stream: Generator[Marker | FailedMarker, None, None],
    progress: Progress,
    lease: Lease,
    hopeless: Callable[[Tally], str],
) -> str:
    """Take the shards of a stream as they end, and close it.

    Args:
        stream: yields the marker or failed marker of each shard.
        progress: the display, and the counts of the run.
        lease: is checked after each shard.
        hopeless: says why the run should stop early; empty if it should continue.

    Returns:
        Why the run stopped early, or an empty string.
    """
    with closing(stream) as events:
        for event in events:
            count(progress.tally, event, made=True)
            if line := line_of(event):
                progress.say(line)
            progress.show()
            lease.check()
            if stopped := hopeless(progress.tally):
                progress.say(f"stopped: {stopped}")
                return stopped
    return ""
