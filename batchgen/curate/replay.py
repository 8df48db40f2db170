"""Generates one sample of an output again, from its row, on this machine and without Ray."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from batchgen import models
from batchgen.errors import InputError, ModelError, SpecError, VerifyFailed, nearest
from batchgen.images.files import encode_image, pixels_in
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.find import Found, find_sample
from batchgen.output.formats import image_extension
from batchgen.output.ledger import Ledger
from batchgen.plan.call_settings import ALWAYS
from batchgen.plan.checks import settle
from batchgen.plan.choices import pinned
from batchgen.plan.plan import Frozen, Plan
from batchgen.plan.sizes import resized
from batchgen.records import ConditionBatch, Sample, ShardRows
from batchgen.shard.images import environment
from batchgen.shard.prepare import Prepared, prepare
from batchgen.spec.call_settings import CALL_SETTINGS
from batchgen.spec.places import reach_stores
from batchgen.spec.sections import Sampling
from batchgen.spec.spec import Spec
from batchgen.spec.tree import merge
from batchgen.storage import open_store

Array = np.ndarray[Any, Any]
TEXTS = ("prompt", "negative_prompt")
HOST = "host"  # of a marker's environment: the only entry that may differ


@dataclass(frozen=True)
class Replay:
    """One sample, generated again.

    Attributes:
        key: of the sample.
        image: the new image's file.
        stored: the file in the output.
        same: whether both are equal, to the byte, before the stored one was signed.
        psnr_db: peak signal-to-noise ratio of their pixels; infinite if they are equal, None if
            they have different sizes.
        changed: setting -> its value, where another one was asked for.
        differences: package or device -> (then, now), where they differ.
        extension: of the image file, such as ``png``.
    """

    key: str
    image: bytes
    stored: bytes
    same: bool
    psnr_db: float | None
    changed: Mapping[str, Any]
    differences: Mapping[str, tuple[str, str]]
    extension: str

    @property
    def exit_code(self) -> int:
        """0, or 4 if the same settings gave other bytes."""
        return 0 if self.same or self.changed else VerifyFailed.exit_code

    @property
    def verdict(self) -> str:
        """One sentence about the two images."""
        if self.same:
            return f"{self.key}: the same {len(self.image):,} bytes (sha256 {self.sha256[:12]})"
        if self.psnr_db is None:
            return f"{self.key}: another size than the stored image"
        if math.isinf(self.psnr_db):
            return f"{self.key}: the same pixels, in a file with other bytes"
        return f"{self.key}: differs from the stored image, PSNR {self.psnr_db:.1f} dB"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()

    def lines(self) -> Iterator[str]:
        """The verdict, and what is different from the first time."""
        yield self.verdict
        for name, (then, now) in self.differences.items():
            yield f"  {name} was {then}, is now {now}"

    def facts(self) -> dict[str, Any]:
        """The result without the images, for JSON."""
        finite = self.psnr_db if self.psnr_db is None or math.isfinite(self.psnr_db) else None
        return {
            "key": self.key,
            "same": self.same,
            "sha256": self.sha256,
            "stored_sha256": hashlib.sha256(self.stored).hexdigest(),
            "psnr_db": finite,
            "changed": dict(self.changed),
            "differences": {name: list(pair) for name, pair in self.differences.items()},
        }


def replay(url: str, key: str, changed: Mapping[str, Any] | None = None) -> Replay:
    """Generate a sample of the output at ``url`` again and compare it with the stored image.

    Tasks that read images read the sample's row from the input; all others need only the row of
    the output.

    Args:
        url: folder or URL of the output.
        key: of an accepted sample.
        changed: settings that get another value, such as ``guidance_scale``.

    Raises:
        InputError: no such sample, or its input row is gone.
        ModelError: the model here has other weights.
        SpecError: a changed setting is unknown, or its value is not allowed.
    """
    in_time = models.fix_sums()
    ledger = Ledger(open_store(url))
    parts = ledger.parts()
    reach_stores(ledger.job())
    found = find_sample(ledger, parts, key)
    plan = parts.of(found.marker.shard)
    given = dict(changed or {})
    plan = _changed(_here(plan, found), given)
    sample, prepared = _sample(plan, found, given)
    device = _device(plan)
    image = encode_sample(_image(plan, sample, prepared, device), plan.spec)
    stored = found.row["image"]["bytes"]
    return Replay(
        key,
        image,
        stored,
        image == stored or _is_signed_copy(image, found),
        psnr(pixels_in(image), pixels_in(stored)),
        given,
        _differences(found, environment(device, models.packages_used(plan.spec)), in_time),
        image_extension(plan.spec),
    )


def _is_signed_copy(image: bytes, found: Found) -> bool:
    """Whether the stored image is this one with a signature, as its row says."""
    return bool(hashlib.sha256(image).hexdigest() == found.row.get("unsigned_sha256"))


def _here(plan: Plan, found: Found) -> Plan:
    """The plan with the model's place on this machine and the sizes of calls that the shard had."""
    info = models.inspect(pinned(plan.spec.model, plan), plan.spec.task)
    if info.manifest_sha256 != plan.model.manifest_sha256:
        raise ModelError(
            f"model {plan.model.model_id} has other weights here (sha256 "
            f"{info.manifest_sha256[:12]}) than when the sample was generated "
            f"({plan.model.manifest_sha256[:12]}); needed: the same files"
        )
    marker, resources = found.marker, plan.spec.resources
    batch = marker.batch_size or resources.micro_batch
    decode = marker.decode_batch_size or min(resources.decode_size, batch)
    sizes = {"batch_size": batch, "decode_batch_size": decode}
    plan = resized(plan, resources.model_copy(update=sizes))
    return replace(plan, model=replace(plan.model, path=info.path))


def _changed(plan: Plan, changed: Mapping[str, Any]) -> Plan:
    """The plan with other settings, for all rows."""
    allowed = [*TEXTS, "seed", *(one for one in ALWAYS if one in CALL_SETTINGS)]
    allowed += plan.model.settings
    for name, value in changed.items():
        if name not in allowed:
            raise SpecError(name, value, f"{', '.join(allowed)}{nearest(name, allowed)}")
    sampling = {name: one for name, one in changed.items() if name in CALL_SETTINGS}
    if {"width", "height"} & sampling.keys() and plan.spec.conditioning.resize == "multiple-of":
        because = "conditioning.resize is multiple-of, so the image's own size counts; remove it"
        raise SpecError("width", sampling.get("width"), "", because=because)
    spec = plan.spec
    columns = spec.input.columns.model_copy(update=dict.fromkeys(sampling))
    tree = merge(spec.sampling.model_dump(), sampling)
    try:
        settings = Sampling.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        raise SpecError(str(fault["loc"][0]), fault.get("input"), fault["msg"]) from None
    source = spec.input.model_copy(update={"columns": columns})
    spec = settle(spec.model_copy(update={"input": source, "sampling": settings}), plan.model)
    return replace(plan, spec=spec, frozen=plan.frozen or Frozen(plan.fingerprints))


def _sample(plan: Plan, found: Found, changed: Mapping[str, Any]) -> tuple[Sample, Prepared]:
    """The sample and its conditioning images."""
    spec = plan.spec
    reads = bool(spec.image_parts) or spec.has_labels or "regions" in plan.model.settings
    rows = _source_row(plan, found) if reads else _row(plan, found)
    prepared = prepare(rows, plan)
    if not prepared.samples:
        raise InputError(f"sample {found.row['key']}: {prepared.dropped[0].message}")
    (sample,) = prepared.samples
    given = {name: one for name, one in changed.items() if name in (*TEXTS, "seed")}
    return replace(sample, **{"seed": found.row["seed"], **given}), prepared


def _row(plan: Plan, found: Found) -> ShardRows:
    """A row of the input as the output's row tells it."""
    row, mapped = found.row, plan.spec.input.columns.mapped()
    values = {column: row[part] for part, column in mapped.items() if part in row}
    key = row["key"].removesuffix(f"-v{row['variant']}")
    if "key" in mapped:
        values[mapped["key"]] = key
    table = pa.table({column: [value] for column, value in (values or {"row": 0}).items()})
    return _one(plan, found, table)


def _source_row(plan: Plan, found: Found) -> ShardRows:
    """The row of the input, from its file."""
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    for span in make_spans(plan, [found.marker.shard]):
        for rows in read_span(span, plan.spec, columns):
            place = rows.source_ids.index(found.row["source_id"])
            return _one(plan, found, rows.table.slice(place, 1))
    raise InputError(f"the input has no row {found.row['source_id']}")


def _one(plan: Plan, found: Found, table: pa.Table) -> ShardRows:
    """A shard of the one sample."""
    row = found.row
    key = row["key"].removesuffix(f"-v{row['variant']}")
    ids, variants = (row["source_id"],), (row["variant"],)
    return ShardRows(found.marker.shard, 0, 1, table, ids, (key,), 0, variants)


def _device(plan: Plan) -> str:
    import torch

    return "cuda:0" if plan.spec.resources.may_use_gpus and torch.cuda.is_available() else "cpu"


def _image(plan: Plan, sample: Sample, prepared: Prepared, device: str) -> Array:
    """Run the stages on a micro-batch of the sample alone; returns uint8 (height, width, 3)."""
    models.import_libraries()
    encode = models.load_encoder(plan.model, plan.spec, [device])
    denoise = models.load_denoiser(plan.model, plan.spec, [device])
    decode = models.load_decoder(plan.model, plan.spec, [device])
    images: dict[str, tuple[Array, ...]]
    images = {part: (arrays[sample.row],) for part, arrays in prepared.images.items()}
    made = decode(denoise(encode(ConditionBatch((sample,), images))))
    pixels: Array = made.pixels[0]
    return pixels


def encode_sample(pixels: Array, spec: Spec) -> bytes:
    """The image file as a run writes it."""
    output = spec.output
    form, quality = output.image_format, output.image_quality
    marked = output.provenance == "xmp"
    return encode_image(pixels, form, quality, output.jpeg_subsampling, marked)


def psnr(one: Array, two: Array) -> float | None:
    """Peak signal-to-noise ratio in dB of two uint8 images; None if their sizes differ."""
    if one.shape != two.shape:
        return None
    error = float(((one.astype(np.float64) - two.astype(np.float64)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _differences(found: Found, now: Mapping[str, str], in_time: bool) -> dict[str, tuple[str, str]]:
    then = found.marker.environment
    names = [name for name in {**then, **now} if name != HOST]
    both = {name: (then.get(name, "unknown"), now.get(name, "unknown")) for name in names}
    if not in_time and now["device"].startswith("CPU"):
        late = "not set when this process loaded torch; set it before, or use another process"
        both[models.SUMS] = ("set", late)
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}
