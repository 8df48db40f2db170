"""Scores, filters and encodes decoded images in threads, and commits the shard."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchgen.images.files import encode_image
from batchgen.models import packages_used
from batchgen.output.commit import commit_shard
from batchgen.output.formats import (
    Finished,
    data_table,
    label_counts,
    parquet_bytes,
    rejects_table,
)
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Counts, Example, Marker
from batchgen.output.ranges import ranges_of
from batchgen.plain_text import short
from batchgen.plan.plan import Plan
from batchgen.records import Dropped, ImageBatch, Sample
from batchgen.secrets import redact
from batchgen.shard.scored import ScoredRows
from batchgen.shard.work import ShardWork, Trial
from batchgen.stages.queue import Later
from batchgen.stages.scorers.call import called
from batchgen.stages.scorers.choose import scorer_named
from batchgen.stages.scorers.detection import FAILED
from batchgen.stages.scorers.filters import FILTERS, NOT_SAFE, Filter
from batchgen.stages.scorers.scorer import Scorer

ENCODE_THREADS = 2
FLAGGED = f"flagged {NOT_SAFE}"
DRIVER = Path("/sys/module/nvidia/version")
PACKAGES = ("batchgen", "torch", "diffusers", "transformers", "pillow", "isal", "pyarrow", "ray")


class ImagePool:
    """Scores and encodes images in threads while the device works on the next micro-batch.

    One thread waits for each micro-batch and scores it; others encode its images.
    """

    def __init__(self, plan: Plan, work: ShardWork, scorers: Sequence[Scorer] = ()) -> None:
        self._spec = plan.spec
        self._scorers = [*(scorer_named(name) for name in plan.spec.scorers), *scorers]
        self._columns = [column.name for one in self._scorers for column in one.columns]
        self._read = ScoredRows(plan, work, self._scorers)
        self._judge_pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._pool = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="image")
        self._notes = work.notes
        self._batches: list[Future[list[Future[Finished] | Dropped]]] = []

    def __enter__(self) -> ImagePool:
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in (self._judge_pool, self._pool):
            pool.shutdown(cancel_futures=True)

    @property
    def micro_batches(self) -> int:
        return len(self._batches)

    def add(self, samples: Sequence[Sample], batch: Later[ImageBatch]) -> None:
        """Queue one micro-batch that is being decoded, with images in the order of ``samples``."""
        self._batches.append(self._judge_pool.submit(self._judge, samples, batch))

    def finished(self) -> tuple[list[Finished], list[Dropped]]:
        """Wait for all images; returns the accepted and the dropped samples, in the order added."""
        finished: list[Finished] = []
        dropped: list[Dropped] = []
        with self._notes.timed("image_wait"):
            for batch in self._batches:
                for one in batch.result():
                    if isinstance(one, Dropped):
                        dropped.append(one)
                    else:
                        finished.append(one.result())
        return finished, dropped

    def _judge(
        self, samples: Sequence[Sample], decoded: Later[ImageBatch]
    ) -> list[Future[Finished] | Dropped]:
        """Score a micro-batch, and queue its accepted images for encoding."""
        batch = decoded.result()
        every: dict[str, Sequence[Any]] = {}
        with self._notes.timed("score"):
            scored = self._read(samples, list(batch.pixels))
            for scorer in self._scorers:
                every |= called(scorer, scored)
        judged: list[Future[Finished] | Dropped] = []
        for index, sample in enumerate(samples):
            scores = {name: values[index] for name, values in every.items()}
            self._count(scores)
            if not batch.finite[index]:
                said = "the model produced NaN or infinite pixels"
                judged.append(_dropped(sample, "failed", "non-finite", said))
            elif (unfit := self._refused_by(scores)) is not None:
                judged.append(_dropped(sample, "rejected", unfit.reason, unfit.message))
            else:
                kept = {name: scores[name] for name in self._columns}
                failed = scores.get(FAILED)
                judged.append(self._pool.submit(self._encode, sample, batch, index, kept, failed))
        return judged

    def _count(self, scores: Mapping[str, object]) -> None:
        """Count an image that is to be flagged."""
        if self._spec.policy.nsfw == "flag" and scores["is_unsafe"]:
            measures = self._notes.measures
            measures[FLAGGED] = measures.get(FLAGGED, 0) + 1

    def _refused_by(self, scores: dict[str, object]) -> Filter | None:
        """The first filter that rejects an image with these scores."""
        policy = self._spec.policy
        refusing = (one for one in FILTERS if one.refuses(getattr(policy, one.policy), scores))
        return next(refusing, None)

    def _encode(
        self,
        sample: Sample,
        batch: ImageBatch,
        index: int,
        scores: dict[str, object],
        failed: Any,
    ) -> Finished:
        output = self._spec.output
        image = encode_image(
            batch.pixels[index],
            output.image_format,
            output.image_quality,
            output.jpeg_subsampling,
            marked=output.provenance == "xmp",
        )
        return Finished(sample, image, batch.truncated[index], scores, failed)


def _dropped(sample: Sample, outcome: str, reason: str, message: str) -> Dropped:
    return Dropped(sample.key, sample.source_id, sample.variant, outcome, reason, message)


def commit(
    work: ShardWork,
    images: ImagePool,
    plan: Plan,
    ledger: Ledger,
    attempt: int,
    device: str,
    trial: Trial,
) -> Marker:
    """Commit the shard; every planned sample is in its data or in its rejects."""
    finished, late = images.finished()
    work.notes.settle()
    dropped = [*work.dropped, *late]
    with work.notes.timed("table"):
        accepted = data_table(plan, work.rows, finished, work.labels)
        rejects = parquet_bytes(rejects_table(dropped)) if dropped else None
    marker = Marker(
        shard=work.rows.shard,
        counts=Counts(
            planned=work.rows.stop_sample - work.rows.first_sample,
            accepted=len(finished),
            rejected=sum(one.outcome == "rejected" for one in dropped),
            failed=sum(one.outcome == "failed" for one in dropped),
        ),
        files=(),
        reasons=dict(Counter(one.reason for one in dropped)),
        truncated_prompts=sum(one.truncated for one in finished),
        timings_s=dict(work.notes.timings_s),
        read_bytes=work.rows.read_bytes,
        batch_size=plan.spec.resources.micro_batch,
        decode_batch_size=trial.decode_batch_size or plan.spec.resources.decode_size,
        micro_batches=images.micro_batches,
        parameter_counts=dict(work.notes.parameter_counts),
        measures=dict(work.notes.measures),
        attempt=attempt,
        environment=environment(device, packages_used(plan.spec)) | _label(plan),
        spec_fingerprint=plan.fingerprints.spec,
        plan_fingerprint=plan.fingerprint,
        finished_at=time.time(),
        examples=examples_of(dropped),
        labels=label_counts(plan, work.rows, finished),
        ranges=ranges_of(accepted),
    )
    return commit_shard(ledger, plan, marker, accepted, rejects)


def examples_of(dropped: Iterable[Dropped]) -> dict[str, Example]:
    """Reason -> the sample with the lowest key, so that reports need not read the rejects."""
    ordered = sorted(dropped, key=lambda one: one.key, reverse=True)
    return {one.reason: Example(one.key, short(redact(one.message))) for one in ordered}


def _label(plan: Plan) -> dict[str, str]:
    """The approximate modes that the images were made with; empty if there is none."""
    label = plan.spec.sampling.approximate.label
    return {"approximate": label} if label else {}


@cache
def environment(device: str, also: tuple[str, ...] = ()) -> dict[str, str]:
    """Host, device and versions. Images are reproducible if all of these except the host are equal.

    A CPU is described by its instruction set, because torch chooses kernels by it; a GPU also by
    its driver, its libraries and the kernels of attention that torch may choose.
    """
    torch = sys.modules.get("torch")  # stages that compute without it do not load it for its name
    if torch is None:
        kind = {"device": "CPU"}
    elif device == "cpu":
        kind = {"device": f"CPU {torch.backends.cpu.get_cpu_capability()}"}
    else:
        kind = _gpu(torch, device)
    found = {}
    for name in (*PACKAGES, *also):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"host": socket.gethostname(), **kind, **found}


def _gpu(torch: Any, device: str) -> dict[str, str]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    attention = {
        "cudnn": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    tf32 = cudnn.allow_tf32 or cuda.matmul.allow_tf32
    return {
        "device": torch.cuda.get_device_name(device),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": DRIVER.read_text().strip() if DRIVER.exists() else "unknown",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(cudnn.version()),
        "attention": ", ".join(name for name, allowed in attention.items() if allowed),
        "float32": "tf32" if tf32 else "ieee",
    }
