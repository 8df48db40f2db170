"""batchgen's stages on the device: specs, loaded models, micro-batches, and whole jobs without Ray.

A job runs as the actor of a layout runs it: rows are read, and two threads take one shard each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from batchgen import models
from batchgen.families import Family, family_named
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan, make_plan
from batchgen.records import (
    Call,
    ConditionBatch,
    EncodedBatch,
    ImageBatch,
    LatentBatch,
    ModelInfo,
    Sample,
    ShardRows,
    derive_seed,
    tupled,
)
from batchgen.shard import frames, tensor_bytes
from batchgen.shard.device import Device
from batchgen.shard.stages import FusedStages, decode_shard, denoise_shard, encode_shard
from batchgen.spec.build import build as build_spec
from batchgen.spec.places import anywhere, reach_stores
from batchgen.spec.spec import Spec
from batchgen.stages.decode import Decoder
from batchgen.stages.denoise import Denoiser
from batchgen.stages.encode import Encoder
from batchgen.storage import open_store
from benchmarks import gpu_models
from benchmarks.gpu_bench import Bench

THREADS = 2  # shards at a time, as resources.shards_in_flight
PIXELS = {"sd15": 512, "sdxl": 1024, "flux": 1024}
SMALL_PIXELS = 32
FAMILY = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl", "flux": "flux"}
TEXT = "text-to-image"
WORDS = ("red star", "blue circle", "tiny house", "old tree", "loud sea", "green hat")


@dataclass(frozen=True)
class Loaded:
    """The three stages of one model, and the plain facts of how they were made."""

    name: str
    family: Family
    spec: Spec
    info: ModelInfo
    encode: Encoder
    denoise: Denoiser
    decode: Decoder
    seconds: dict[str, float]

    def fused(self, batch: ConditionBatch) -> ImageBatch:
        return self.decode(self.denoise(self.encode(batch)))

    def latents(self, batch: ConditionBatch) -> LatentBatch:
        return self.denoise(self.encode(batch))

    def at(self, batch_size: int) -> Loaded:
        """The same models, called with another batch size."""
        denoise, decode = self.denoise, self.decode
        return replace(
            self,
            denoise=Denoiser(denoise.pipeline, denoise.adapter, batch_size, denoise._switch),
            decode=Decoder(decode.pipeline, decode.adapter, batch_size),
        )

    @property
    def denoiser(self) -> Any:
        """The U-Net or transformer."""
        part: Any = getattr(self.denoise.pipeline, self.denoiser_name)
        return part

    @property
    def denoiser_name(self) -> str:
        return next(name for name in self.family.denoiser if name in ("unet", "transformer"))


def dtype_of(bench: Bench) -> str:
    """bfloat16, but on a CPU float32, which is quicker there."""
    return "bfloat16" if bench.cuda else "float32"


def pixels_of(bench: Bench, model: str) -> int:
    return SMALL_PIXELS if bench.small else PIXELS[model]


def folder_of(bench: Bench, model: str) -> Path:
    """The saved model; the first section that asks builds it."""
    dtype = getattr(torch, dtype_of(bench))
    return gpu_models.build(model, bench.work / model, bench.small, bench.device, dtype)


def spec_of(
    bench: Bench, model: str, batch_size: int, output: str = "none", /, **sections: Any
) -> Spec:
    """A text-to-image job on the saved model, of the drawn prompts."""
    size = pixels_of(bench, model)
    given = {
        "task": TEXT,
        "input": {"path": str(prompts(bench))},
        "model": {"path": str(folder_of(bench, model)), "dtype": dtype_of(bench)},
        "output": {"url": str(bench.work / "outputs" / output)},
        "resources": {"batch_size": batch_size},
    }
    sampling = {"width": size, "height": size}
    for name, fields in sections.items():
        given[name] = {**given.get(name, {}), **fields}
    given["sampling"] = {**sampling, **given.get("sampling", {})}
    return build_spec(given)


def prompts(bench: Bench) -> Path:
    """The input: a Parquet file of different prompts."""
    path = bench.work / "prompts.parquet"
    if not path.exists():
        count = 1024
        texts = [f"a {WORDS[n % 6]} and a {WORDS[n // 6 % 6]} number {n}" for n in range(count)]
        part = path.with_suffix(".part")
        pq.write_table(pa.table({"prompt": texts}), part)
        part.rename(path)
    return path


def info_of(bench: Bench, spec: Spec) -> ModelInfo:
    """What batchgen finds in the model's folder; saved, since its files are hashed for it."""
    known = Path(spec.model.path).with_suffix(f".{spec.model.dtype}.json")
    if known.exists():
        return ModelInfo(**{key: tupled(one) for key, one in json.loads(known.read_text()).items()})
    info = models.inspect(spec.model, spec.task)
    known.write_text(json.dumps(asdict(info)))
    return info


def load(bench: Bench, model: str, batch_size: int, /, **sections: Any) -> Loaded:
    """Load a saved model as a replica does."""
    start = time.perf_counter()
    spec = spec_of(bench, model, batch_size, **sections)
    built = time.perf_counter()
    info = info_of(bench, spec)
    inspected = time.perf_counter()
    encode, denoise, decode = load_stages(spec, info, [bench.device])
    bench.wait()
    seconds = {
        "build_folder": built - start,
        "inspect": inspected - built,
        "load": time.perf_counter() - inspected,
    }
    return Loaded(
        model,
        family_named(TEXT, FAMILY[model]),
        spec,
        info,
        encode,
        denoise,
        decode,
        {name: round(value, 2) for name, value in seconds.items()},
    )


def load_stages(
    spec: Spec, info: ModelInfo, devices: Sequence[str]
) -> tuple[Encoder, Denoiser, Decoder]:
    return (
        models.load_encoder(info, spec, devices),
        models.load_denoiser(info, spec, devices),
        models.load_decoder(info, spec, devices),
    )


def call(size: int, steps: int, guidance: float = 5.0, **more: Any) -> Call:
    return Call(
        num_inference_steps=steps,
        guidance_scale=guidance,
        strength=None,
        width=size,
        height=size,
        **more,
    )


def batch(rows: Sequence[int], shared: Call) -> ConditionBatch:
    """A micro-batch of samples that depend on their row number only."""
    samples = tuple(
        Sample(
            key=f"row{row}",
            source_id=str(row),
            row=row,
            variant=0,
            seed=derive_seed(5, f"row{row}"),
            prompt=f"a {WORDS[row % 6]} number {row}",
            negative_prompt="grey",
            call=shared,
        )
        for row in rows
    )
    return ConditionBatch(samples, {})


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def captured(module: Any, run: Callable[[], Any]) -> Arguments:
    """The arguments of the module's first call while ``run`` runs; they stay on the device."""
    seen: list[Arguments] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append((args, dict(kwargs)))

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def wired(encoded: EncodedBatch) -> EncodedBatch:
    """The batch after the way between two pools of the staged layout."""
    (arrived,) = tensor_bytes.encoded_from_bytes(tensor_bytes.encoded_to_bytes([encoded]))
    return arrived


def wired_latents(latents: LatentBatch) -> LatentBatch:
    (arrived,) = tensor_bytes.latents_from_bytes(tensor_bytes.latents_to_bytes([latents]))
    return arrived


# --- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A job that ran: its markers, seconds without planning and loading, and what verify says."""

    markers: list[Marker]
    seconds: float
    accepted: int
    problems: list[str]
    output: Path


def job_rows(spec: Spec, plan: Plan) -> list[ShardRows]:
    columns = read_columns(spec, [name for name, _ in plan.columns])
    spans = make_spans(plan, range(plan.shards))
    return [rows for span in spans for rows in read_span(span, spec, columns)]


def run_job(
    spec: Spec, info: ModelInfo, stages: Sequence[Any], device: str, threads: int = THREADS
) -> Ran:
    """Run all shards of a job in one process, in the spec's layout.

    Args:
        stages: the loaded encoder, denoiser and decoder.
    """
    reach_stores(spec)
    spec = anywhere(spec)
    plan = make_plan(spec, info)
    ledger = Ledger(open_store(spec.output.url))
    ledger.freeze(plan, spec)
    ledger = Ledger(ledger.store.in_place())
    work = _fused(stages, device) if spec.resources.layout == "fused" else _staged(stages, device)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        made = [pool.submit(work, rows, plan, ledger) for rows in job_rows(plan.spec, plan)]
        markers = [one.result() for one in made]
    seconds = time.perf_counter() - start
    findings = verify(ledger)
    problems = [str(one) for one in findings.problems][:5]
    return Ran(markers, seconds, findings.accepted, problems, Path(spec.output.url))


Work = Callable[[ShardRows, Plan, Ledger], Marker]


def _fused(stages: Sequence[Any], device: str) -> Work:
    whole = FusedStages(*stages, device)

    def work(rows: ShardRows, plan: Plan, ledger: Ledger) -> Marker:
        return whole(frames.to_rows(frames.from_rows(rows)), plan, ledger, 1)

    return work


def _staged(stages: Sequence[Any], device: str) -> Work:
    """As the three actors of the staged layout: everything between them as bytes."""
    encoder, denoiser, decoder = stages
    devices = [Device(device) for _ in stages]

    def work(rows: ShardRows, plan: Plan, ledger: Ledger) -> Marker:
        begun, encoded = encode_shard(encoder, devices[0], rows, plan)
        sent = tensor_bytes.encoded_to_bytes(encoded)
        frame = frames.from_work(begun, frames.ENCODED, 1, sent)
        arrived = tensor_bytes.encoded_from_bytes(frame.tensors)
        half, latents = denoise_shard(denoiser, devices[1], frames.to_work(frame), arrived)
        sent = tensor_bytes.latents_to_bytes(latents)
        frame = frames.from_work(half, frames.DENOISED, 1, sent)
        last = tensor_bytes.latents_from_bytes(frame.tensors)
        return decode_shard(decoder, devices[2], frames.to_work(frame), last, plan, ledger, 1)

    return work
