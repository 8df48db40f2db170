"""Lines that a run says once: what it will make, and what became of a shard."""

from __future__ import annotations

import sys
from collections.abc import Callable

from batchgen.output.ledger import FailedMarker, Marker, States
from batchgen.plain_text import plain, short
from batchgen.plan.plan import Plan
from batchgen.secrets import redact


def opening(plan: Plan, states: States, samples: int) -> str:
    """The first line of a run: how much is to be made, and by what."""
    made = f", {len(states.committed):,} of them committed already" if states.committed else ""
    again = f", {len(states.failed):,} failed ones tried again" if states.failed else ""
    spec = plan.spec
    return (
        f"{samples:,} samples in {len(states.numbers):,} shards{made}{again}: {spec.task} with "
        f"{plan.model.model_id}, {plan.model.scheduler}, "
        f"{spec.sampling.num_inference_steps} steps, batch {spec.resources.batch_size}, "
        f"{spec.resources.layout}"
    )


def line_of(event: Marker | FailedMarker) -> str:
    """Of a shard that failed, or was committed at a later attempt; empty for any other."""
    if isinstance(event, FailedMarker):
        return f"shard {event.shard} failed: {event.error}: {short(redact(event.message))}"
    return f"shard {event.shard} committed at attempt {event.attempt}" if event.attempt > 1 else ""


def teller(quiet: bool) -> Callable[[str], None]:
    """Prints messages while there is no progress display yet."""
    return (lambda words: None) if quiet else (lambda words: print(plain(words), file=sys.stderr))
