"""Composes the lines that a run prints once: its plan at the start, and results of shards."""

from __future__ import annotations

import sys
from collections.abc import Callable

from batchgen.output.ledger import States
from batchgen.output.marker import FailedMarker, Marker
from batchgen.plain_text import plain, short
from batchgen.plan.plan import Plan
from batchgen.secrets import redact


def opening(plan: Plan, states: States, samples: int) -> str:
    """The first line of a run: the number of samples, the model and the main settings."""
    made = f", {len(states.committed):,} of them already committed" if states.committed else ""
    again = f", {len(states.failed):,} failed ones retried" if states.failed else ""
    spec, approximate = plan.spec, plan.spec.sampling.approximate.label
    return (
        f"{samples:,} samples in {len(states.numbers):,} shards{made}{again}: {spec.task} with "
        f"{plan.model.model_id}, {plan.model.scheduler}, "
        f"{spec.sampling.num_inference_steps} steps, batch {spec.resources.micro_batch}, "
        f"{spec.resources.layout}, {spec.model.dtype}"
        f"{f', approximate ({approximate})' if approximate else ''}"
    )


def line_of(event: Marker | FailedMarker) -> str:
    """A line for a shard that failed or needed several attempts; empty for any other shard."""
    if isinstance(event, FailedMarker):
        return f"shard {event.shard} failed: {event.error}: {short(redact(event.message))}"
    return f"shard {event.shard} committed at attempt {event.attempt}" if event.attempt > 1 else ""


def teller(quiet: bool) -> Callable[[str], None]:
    """A function that prints messages until the progress display exists."""
    return (lambda words: None) if quiet else (lambda words: print(plain(words), file=sys.stderr))
