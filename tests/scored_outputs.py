"""Makes outputs with scores, in both layouts, without Ray and without a diffusion model."""

from __future__ import annotations

from typing import Any

from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.models.scorers import load_scorers
from batchgen.output.ledger import Ledger
from batchgen.plan.plan import Plan
from batchgen.shard import frames
from batchgen.shard.device import Device
from batchgen.shard.stages import FusedStages, decode_shard, encode_shard
from tests.arithmetic_stages import ArithmeticDecoder, ArithmeticDenoiser, ArithmeticEncoder


def make(plan: Plan, ledger: Ledger, layout: str) -> None:
    """A run without Ray; in the staged layout a shard passes through bytes between the stages."""
    ledger.freeze(plan, plan.spec)
    encoder, denoiser, decoder = ArithmeticEncoder(), ArithmeticDenoiser(), ArithmeticDecoder()
    parts: Any = (encoder, denoiser, decoder)
    scorers = load_scorers(plan.spec.score)
    device, fused = Device(), FusedStages(*parts, scorers=scorers)
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    for span in make_spans(plan, ledger.states(plan).pending):
        for rows in read_span(span, plan.spec, columns):
            if layout == "fused":
                fused(rows, plan, ledger, attempt=1)
                continue
            work, encoded = encode_shard(parts[0], device, rows, plan)
            frame = frames.from_work(work, frames.ENCODED, 1, b"")
            work = frames.to_work(frames.from_block(frame.to_block()))
            latents = [denoiser(one) for one in encoded]
            decode_shard(parts[2], device, work, latents, plan, ledger, 1, scorers=scorers)
