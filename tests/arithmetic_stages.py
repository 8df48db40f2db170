"""Stages without a model: pixels are a pure function of a sample's seed, prompt and size."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.plan import Plan
from batchgen.records import Call, ConditionBatch, EncodedBatch, ImageBatch, LatentBatch, Sample
from batchgen.shard.stages import FusedStages
from batchgen.stages.queue import Later, Queue

SEED, PROMPT, FLAT, BROKEN = range(4)


class Arithmetic:
    """What the pool asks of any stage: a pipeline with components. No torch is loaded for it."""

    def __init__(self) -> None:
        self.pipeline = SimpleNamespace()


class ArithmeticEncoder(Arithmetic):
    """A prompt with the word ``flat`` or ``broken`` gives a flat or a non-finite image."""

    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        count = len(batch.samples)
        facts = np.array([_facts(sample, batch, n) for n, sample in enumerate(batch.samples)])
        return EncodedBatch(
            call=batch.call,
            prompts={"facts": facts},  # (n, 4)
            prompt_index=tuple(range(count)),
            negative_index=None,
            conditions={},
            labels=(),
            generator_states=facts[:, :1],
            truncated=tuple("long" in sample.prompt for sample in batch.samples),
        )


class ArithmeticDenoiser(Arithmetic):
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        facts = batch.prompts["facts"][list(batch.prompt_index)]  # (n, 4)
        return LatentBatch(batch.call, facts, batch.truncated)


class ArithmeticDecoder(Arithmetic):
    def start(self, batch: LatentBatch, batch_size: int | None = None) -> Later[ImageBatch]:
        decoded = self(batch)
        return Later(Queue().mark(), lambda: decoded)

    def __call__(self, batch: LatentBatch) -> ImageBatch:
        facts = batch.latents.tolist()
        return ImageBatch(
            pixels=np.stack([_pixels(one, batch.call) for one in facts]),
            finite=tuple(not one[BROKEN] for one in facts),
            truncated=batch.truncated,
        )


def _facts(sample: Sample, batch: ConditionBatch, place: int) -> list[int]:
    given = sample.prompt.encode() + sample.negative_prompt.encode()
    for images in batch.images.values():
        given += images[place].tobytes()
    words = sample.prompt.split()
    return [sample.seed, zlib.crc32(given), "flat" in words, "broken" in words]


def _pixels(facts: list[int], call: Call) -> np.ndarray[Any, Any]:
    shape = (call.height, call.width, 3)
    if facts[FLAT]:
        return np.full(shape, facts[SEED] % 256, dtype=np.uint8)
    generator = np.random.default_rng([facts[SEED], facts[PROMPT]])
    return generator.integers(0, 256, shape, dtype=np.uint8)


def arithmetic_stages() -> FusedStages:
    encoder, denoiser, decoder = ArithmeticEncoder(), ArithmeticDenoiser(), ArithmeticDecoder()
    return FusedStages(encoder, denoiser, decoder)  # type: ignore[arg-type]


def make_output(plan: Plan, ledger: Ledger) -> list[Marker]:
    """A whole run without Ray: freeze the plan, read every pending shard, make and commit it."""
    if ledger.plan() is None:
        ledger.freeze(plan, plan.spec)
    return _made(plan, ledger)


def make_parts(ledger: Ledger) -> list[Marker]:
    """The same for the pending shards of all parts of an output."""
    return [marker for plan in ledger.parts() for marker in _made(plan, ledger)]


def _made(plan: Plan, ledger: Ledger) -> list[Marker]:
    stages = arithmetic_stages()
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    return [
        stages(rows, plan, ledger, attempt=1)
        for span in make_spans(plan, ledger.states(plan).pending)
        for rows in read_span(span, plan.spec, columns)
    ]
