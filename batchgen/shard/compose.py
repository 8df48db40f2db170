"""One shard, from its rows to its committed marker: the stages composed, with or without Ray."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from batchgen.images.files import encode_image
from batchgen.models import packages_used, parameter_counts
from batchgen.output.formats import Finished, label_counts, write_shard
from batchgen.output.ledger import Counts, Example, Ledger, Marker
from batchgen.plain_text import short
from batchgen.plan.plan import Plan
from batchgen.records import (
    ConditionBatch,
    Dropped,
    EncodedBatch,
    ImageBatch,
    LatentBatch,
    Sample,
    ShardRows,
    micro_batches,
)
from batchgen.secrets import redact
from batchgen.shard.prepare import Prepared, left_out, prepare
from batchgen.stages.score import score

if TYPE_CHECKING:
    from batchgen.stages.decode import Decoder
    from batchgen.stages.denoise import Denoiser
    from batchgen.stages.encode import Encoder

In = TypeVar("In")
Out = TypeVar("Out")

ENCODE_THREADS = 2


@dataclass(frozen=True)
class Notes:
    """What is noted about a shard on its way: seconds by stage, and the parts held."""

    timings_s: dict[str, float] = field(default_factory=dict)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.timings_s[stage] = round(self.timings_s.get(stage, 0.0) + elapsed, 6)


@dataclass(frozen=True)
class ShardWork:
    """A shard between stages: its rows, what its samples are, and what was noted so far."""

    rows: ShardRows
    groups: tuple[tuple[Sample, ...], ...]  # by micro-batch
    dropped: tuple[Dropped, ...]
    notes: Notes


@dataclass(frozen=True)
class Trial:
    """One attempt at a shard, in the light of those before.

    Attributes:
        alone: keys of samples that are worked on each in a micro-batch of its own.
        without: key -> why, for samples that are not worked on, but noted as failed.
        working_on: is told the keys of the samples that are worked on next.
        made: is told how many samples a micro-batch has brought past the denoiser.
    """

    alone: Collection[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    working_on: Callable[[Iterable[str]], None] = lambda keys: None
    made: Callable[[int], None] = lambda samples: None

    def on(self, samples: Iterable[Sample]) -> None:
        self.working_on(sample.key for sample in samples)


UNTRIED = Trial()


def start_work(rows: ShardRows, plan: Plan, trial: Trial) -> tuple[ShardWork, Prepared]:
    """Rows into samples and rejects; the conditioning images go no further than the encoder."""
    notes = Notes()
    with notes.timed("prepare"):
        prepared = prepare(rows, plan, trial.without, trial.working_on)
    trial.on(())
    shared = [sample for sample in prepared.samples if sample.key not in trial.alone]
    groups = micro_batches(shared, plan.spec.resources.batch_size)
    groups += [(sample,) for sample in prepared.samples if sample.key in trial.alone]
    mapped = plan.spec.input.columns.mapped()
    kept = plan.spec.input.keep_columns or ()
    images = {mapped[part] for part in prepared.images} - set(kept)
    if images:
        rows = replace(rows, table=rows.table.drop_columns(sorted(images)))
    return ShardWork(rows, tuple(groups), prepared.dropped, notes), prepared


def condition_batches(work: ShardWork, prepared: Prepared) -> list[ConditionBatch]:
    """The shard's micro-batches as the encoder takes them."""
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
    """The same shard with the trial's samples left out or in batches of their own."""
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


def run_stage(stage: Callable[[In], Out], batch: In, name: str, notes: Notes) -> Out:
    """One stage on one micro-batch, timed."""
    with notes.timed(name):
        return stage(batch)


class FusedStages:
    """All stages in one process; image encoding overlaps the next micro-batch.

    ``lock`` is held only while the device works, so that another thread may prepare, encode images
    and upload its own shard meanwhile.
    """

    def __init__(
        self, encoder: Encoder, denoiser: Denoiser, decoder: Decoder, device: str = "cpu"
    ) -> None:
        self.device = device
        self.encoder = encoder
        self.denoiser = denoiser
        self.decoder = decoder
        self.parameter_counts = {
            "encoder": parameter_counts(encoder),
            "denoiser": parameter_counts(denoiser),
            "decoder": parameter_counts(decoder),
        }
        self.lock = threading.Lock()

    def __call__(
        self, rows: ShardRows, plan: Plan, ledger: Ledger, attempt: int, trial: Trial = UNTRIED
    ) -> Marker:
        work, prepared = start_work(rows, plan, trial)
        work.notes.parameter_counts.update(self.parameter_counts)
        batches = condition_batches(work, prepared)
        with ImagePool(plan, work, self.device) as images:
            waiting = time.perf_counter()
            with self.lock:
                work.notes.timings_s["wait"] = round(time.perf_counter() - waiting, 6)
                for batch in batches:
                    trial.on(batch.samples)
                    encoded = run_stage(self.encoder, batch, "encode", work.notes)
                    latents = run_stage(self.denoiser, encoded, "denoise", work.notes)
                    decoded = run_stage(self.decoder, latents, "decode", work.notes)
                    images.add(batch.samples, decoded)
                    trial.made(len(batch.samples))
            trial.on(())
            return commit(work, images, plan, ledger, attempt)


def encode_shard(
    encoder: Encoder, rows: ShardRows, plan: Plan, trial: Trial = UNTRIED
) -> tuple[ShardWork, list[EncodedBatch]]:
    """First stage of the staged layout."""
    work, prepared = start_work(rows, plan, trial)
    work.notes.parameter_counts["encoder"] = parameter_counts(encoder)
    encoded = []
    for batch in condition_batches(work, prepared):
        trial.on(batch.samples)
        encoded.append(run_stage(encoder, batch, "encode", work.notes))
    trial.on(())
    return work, encoded


def denoise_shard(
    denoiser: Denoiser, work: ShardWork, batches: Sequence[EncodedBatch], trial: Trial = UNTRIED
) -> tuple[ShardWork, list[LatentBatch]]:
    """Second stage of the staged layout."""
    work, encoded = isolate(work, batches, trial)
    work.notes.parameter_counts["denoiser"] = parameter_counts(denoiser)
    latents = []
    for group, batch in zip(work.groups, encoded, strict=True):
        trial.on(group)
        latents.append(run_stage(denoiser, batch, "denoise", work.notes))
        trial.made(len(group))
    trial.on(())
    return work, latents


def decode_shard(
    decoder: Decoder,
    lock: threading.Lock,
    work: ShardWork,
    batches: Sequence[LatentBatch],
    plan: Plan,
    ledger: Ledger,
    attempt: int,
    device: str,
    trial: Trial = UNTRIED,
) -> Marker:
    """Last stage of the staged layout: decode, score, write, commit."""
    work, latents = isolate(work, batches, trial)
    work.notes.parameter_counts["decoder"] = parameter_counts(decoder)
    with ImagePool(plan, work, device) as images:
        with lock:
            for group, batch in zip(work.groups, latents, strict=True):
                trial.on(group)
                images.add(group, run_stage(decoder, batch, "decode", work.notes))
        trial.on(())
        return commit(work, images, plan, ledger, attempt)


class ImagePool:
    """Scores and encodes decoded micro-batches in threads while the device goes on."""

    def __init__(self, plan: Plan, work: ShardWork, device: str) -> None:
        self.device = device
        self._spec = plan.spec
        self._pool = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="image")
        self._notes = work.notes
        self._finished: list[Future[Finished]] = []
        self.dropped: list[Dropped] = []
        self.micro_batches = 0

    def __enter__(self) -> ImagePool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, samples: Sequence[Sample], batch: ImageBatch) -> None:
        """Take one decoded micro-batch, in the order of ``samples``."""
        self.micro_batches += 1
        scores = score(batch.pixels)
        for index, sample in enumerate(samples):
            if not batch.finite[index]:
                self._drop(sample, "failed", "non-finite", "the model gave NaN or infinite pixels")
            elif self._spec.policy.reject_flat and scores["is_flat"][index]:
                self._drop(sample, "rejected", "flat-image", "every pixel has the same colour")
            else:
                self._finished.append(
                    self._pool.submit(
                        self._encode,
                        sample,
                        batch,
                        index,
                        float(scores["pixel_mean"][index]),
                        float(scores["pixel_std"][index]),
                    )
                )

    def finished(self) -> list[Finished]:
        """Wait for the last image."""
        with self._notes.timed("image_wait"):
            return [future.result() for future in self._finished]

    def _encode(
        self, sample: Sample, batch: ImageBatch, index: int, mean: float, std: float
    ) -> Finished:
        output = self._spec.output
        image = encode_image(
            batch.pixels[index],
            output.image_format,
            output.image_quality,
            output.jpeg_subsampling,
        )
        return Finished(sample, image, batch.truncated[index], mean, std)

    def _drop(self, sample: Sample, outcome: str, reason: str, message: str) -> None:
        self.dropped.append(
            Dropped(sample.key, sample.source_id, sample.variant, outcome, reason, message)
        )


def commit(work: ShardWork, images: ImagePool, plan: Plan, ledger: Ledger, attempt: int) -> Marker:
    """Write data, rejects, and the marker last; every planned sample is in one of the two files.

    If another attempt has committed the shard meanwhile, its files are left as they are.
    """
    finished = images.finished()
    committed = ledger.committed(plan, work.rows.shard)
    if committed is not None:
        return committed
    dropped = [*work.dropped, *images.dropped]
    counts = Counts(
        planned=work.rows.stop_sample - work.rows.first_sample,
        accepted=len(finished),
        rejected=sum(one.outcome == "rejected" for one in dropped),
        failed=sum(one.outcome == "failed" for one in dropped),
    )
    if not counts.add_up():
        raise AssertionError(f"shard {work.rows.shard} does not add up: {counts}")
    with work.notes.timed("write"):
        files = write_shard(ledger.store, plan, work.rows, finished, dropped)
    return ledger.commit(
        Marker(
            shard=work.rows.shard,
            counts=counts,
            files=files,
            reasons=dict(Counter(one.reason for one in dropped)),
            truncated_prompts=sum(one.truncated for one in finished),
            timings_s=dict(work.notes.timings_s),
            read_bytes=work.rows.read_bytes,
            batch_size=plan.spec.resources.batch_size,
            micro_batches=images.micro_batches,
            parameter_counts=dict(work.notes.parameter_counts),
            attempt=attempt,
            environment=environment(images.device, packages_used(plan.spec.model)),
            spec_fingerprint=plan.fingerprints.spec,
            plan_fingerprint=plan.fingerprint,
            finished_at=time.time(),
            examples=examples_of(dropped),
            labels=label_counts(plan, work.rows, finished),
        )
    )


def examples_of(dropped: Iterable[Dropped]) -> dict[str, Example]:
    """Reason -> its first sample by key, so that nobody need read the rejects to be told why."""
    ordered = sorted(dropped, key=lambda one: one.key, reverse=True)
    return {one.reason: Example(one.key, short(redact(one.message))) for one in ordered}


def environment(device: str, also: Sequence[str] = ()) -> dict[str, str]:
    """Host, device and versions: bytes are promised to be equal where these are, but for the host.

    Of a CPU its instruction set counts, since kernels are chosen by it.
    """
    import socket
    from importlib.metadata import version

    torch = sys.modules.get("torch")  # stages that compute without it do not load it for its name
    names = ("batchgen", "torch", "diffusers", "transformers", "pillow", "isal", "pyarrow", "ray")
    if torch is None:
        kind = "CPU"
    elif device == "cpu":
        kind = f"CPU {torch.backends.cpu.get_cpu_capability()}"
    else:
        kind = torch.cuda.get_device_name(device)
    found = {}
    for name in (*names, *also):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed"
    return {"host": socket.gethostname(), "device": kind, **found}
