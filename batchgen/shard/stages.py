"""Composes the stages for one shard, from its rows to its committed marker; needs no Ray.

A shard holds its device's lock only while it gives the device work, so that other threads can
meanwhile prepare, score, encode or upload their own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from batchgen.models import parameter_counts
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.plan import Plan
from batchgen.records import (
    ConditionBatch,
    EncodedBatch,
    ImageBatch,
    LatentBatch,
    Sample,
    ShardRows,
    micro_batches,
)
from batchgen.shard.device import Device, Flight
from batchgen.shard.images import ImagePool, commit
from batchgen.shard.prepare import Prepared, left_out, prepare
from batchgen.shard.scored import source_images
from batchgen.shard.work import Notes, ShardWork, Trial
from batchgen.spec.tasks import FOLLOWING

if TYPE_CHECKING:
    from batchgen.stages.decode import Decoder
    from batchgen.stages.denoise import Denoiser
    from batchgen.stages.encode import Encoder
    from batchgen.stages.queue import Later
    from batchgen.stages.scorers.scorer import Scorer

UNTRIED = Trial()


def start_work(rows: ShardRows, plan: Plan, trial: Trial) -> tuple[ShardWork, Prepared]:
    """Turn rows into samples and rejects, and drop the columns that only prepare reads."""
    notes = Notes()
    with notes.timed("prepare"):
        prepared = prepare(rows, plan, trial.without, trial.working_on)
    trial.on(())
    shared = [sample for sample in prepared.samples if sample.key not in trial.alone]
    size = plan.spec.resources.micro_batch
    groups = micro_batches(shared, size)
    groups += [(sample,) for sample in prepared.samples if sample.key in trial.alone]
    notes.measures["padding"] = sum(size - len(group) for group in groups)
    mapped = plan.spec.input.columns.mapped()
    kept = plan.spec.input.keep_columns or ()
    read = {mapped[part] for part in (*prepared.images, *FOLLOWING) if part in mapped} - set(kept)
    if read:
        rows = replace(rows, table=rows.table.drop_columns(sorted(read)))
    compares = any(one.settled.compares for one in plan.spec.score if one.settled is not None)
    sources = source_images(prepared) if compares else {}
    work = ShardWork(rows, tuple(groups), prepared.dropped, notes, prepared.labels, sources)
    return work, prepared


def condition_batches(work: ShardWork, prepared: Prepared) -> list[ConditionBatch]:
    """The shard's micro-batches as inputs of the encoder."""
    return [
        ConditionBatch(
            samples=group,
            images={
                part: tuple(images[sample.row] for sample in group)
                for part, images in prepared.images.items()
            },
        )
        for group in work.groups
    ]


Batch = TypeVar("Batch", EncodedBatch, LatentBatch)


def isolate(
    work: ShardWork, batches: Sequence[Batch], trial: Trial
) -> tuple[ShardWork, list[Batch]]:
    """The shard without ``trial.without``, and with each of ``trial.alone`` in its own batch."""
    if not trial.alone and not trial.without:
        return work, list(batches)
    groups: list[tuple[Sample, ...]] = []
    cut: list[Batch] = []
    dropped = list(work.dropped)
    for group, batch in zip(work.groups, batches, strict=True):
        together = []
        for place, sample in enumerate(group):
            if sample.key in trial.without:
                why = trial.without[sample.key]
                dropped.append(left_out(sample.key, sample.source_id, sample.variant, why))
            elif sample.key in trial.alone:
                groups.append((sample,))
                cut.append(batch.take([place]))
            else:
                together.append(place)
        if together:
            groups.append(tuple(group[place] for place in together))
            cut.append(batch.take(together))
    return replace(work, groups=tuple(groups), dropped=tuple(dropped)), cut


def decoding(decoder: Decoder, trial: Trial) -> Callable[[LatentBatch], Later[ImageBatch]]:
    """The decoder, with the size of calls that this attempt has memory for."""
    if trial.decode_batch_size is None:
        return decoder.start
    return partial(decoder.start, batch_size=trial.decode_batch_size)


class FusedStages:
    """All stages in one process; images are encoded while the next micro-batch is generated."""

    def __init__(
        self,
        encoder: Encoder,
        denoiser: Denoiser,
        decoder: Decoder,
        device: str = "cpu",
        scorers: Sequence[Scorer] = (),
    ) -> None:
        self.device = Device(device)
        self.scorers = scorers
        self.encoder = encoder
        self.denoiser = denoiser
        self.decoder = decoder
        self.parameter_counts = {
            "encoder": parameter_counts(encoder),
            "denoiser": parameter_counts(denoiser),
            "decoder": parameter_counts(decoder),
        }

    def __call__(
        self, rows: ShardRows, plan: Plan, ledger: Ledger, attempt: int, trial: Trial = UNTRIED
    ) -> Marker:
        work, prepared = start_work(rows, plan, trial)
        work.notes.parameter_counts.update(self.parameter_counts)
        batches = condition_batches(work, prepared)
        run, queue, notes = self.device.run, self.device.queue, work.notes
        flight = Flight(queue, trial)
        with ImagePool(plan, work, self.scorers) as images:
            with self.device.held(notes):
                for batch in batches:
                    flight.begin(batch.samples)
                    with queue.beside():  # while the device works on the micro-batch before
                        encoded = run(self.encoder, batch, "encode", notes)
                    queue.join(encoded.tensors())
                    latents = run(self.denoiser, encoded, "denoise", notes)
                    decoded = run(decoding(self.decoder, trial), latents, "decode", notes)
                    images.add(batch.samples, decoded)
                    flight.given(batch.samples, decoded.mark)
            flight.end()
            return commit(work, images, plan, ledger, attempt, self.device.name, trial)


def encode_shard(
    encoder: Encoder, device: Device, rows: ShardRows, plan: Plan, trial: Trial = UNTRIED
) -> tuple[ShardWork, list[EncodedBatch]]:
    """The first pool of the staged layout: prepare and encode."""
    work, prepared = start_work(rows, plan, trial)
    work.notes.parameter_counts["encoder"] = parameter_counts(encoder)
    encoded = []
    batches = condition_batches(work, prepared)
    flight = Flight(device.queue, trial)
    with device.held(work.notes):
        for batch in batches:
            flight.begin(batch.samples)
            encoded.append(device.run(encoder, batch, "encode", work.notes))
            flight.given(batch.samples, device.queue.mark())
    flight.end()
    work.notes.settle()
    return work, encoded


def denoise_shard(
    denoiser: Denoiser,
    device: Device,
    work: ShardWork,
    batches: Sequence[EncodedBatch],
    trial: Trial = UNTRIED,
) -> tuple[ShardWork, list[LatentBatch]]:
    """The second pool of the staged layout: denoise."""
    work, encoded = isolate(work, batches, trial)
    work.notes.parameter_counts["denoiser"] = parameter_counts(denoiser)
    latents = []
    flight = Flight(device.queue, trial)
    with device.held(work.notes):
        for group, batch in zip(work.groups, encoded, strict=True):
            flight.begin(group)
            latents.append(device.run(denoiser, batch, "denoise", work.notes))
            flight.given(group, device.queue.mark())
    flight.end()
    work.notes.settle()
    return work, latents


def decode_shard(
    decoder: Decoder,
    device: Device,
    work: ShardWork,
    batches: Sequence[LatentBatch],
    plan: Plan,
    ledger: Ledger,
    attempt: int,
    trial: Trial = UNTRIED,
    scorers: Sequence[Scorer] = (),
) -> Marker:
    """The last pool of the staged layout: decode, score, write, commit."""
    work, latents = isolate(work, batches, trial)
    work.notes.parameter_counts["decoder"] = parameter_counts(decoder)
    flight = Flight(device.queue, trial)
    with ImagePool(plan, work, scorers) as images:
        with device.held(work.notes):
            for group, batch in zip(work.groups, latents, strict=True):
                flight.begin(group)
                decoded = device.run(decoding(decoder, trial), batch, "decode", work.notes)
                images.add(group, decoded)
                flight.given(group, decoded.mark)
        flight.end()
        return commit(work, images, plan, ledger, attempt, device.name, trial)
