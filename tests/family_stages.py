"""Composes the stages of any family, and compares their pixels with the plain pipeline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from batchgen import models
from batchgen.families import Family
from batchgen.records import Call, ConditionBatch, ImageBatch, Sample, derive_seed
from batchgen.shard import tensor_bytes
from batchgen.spec.build import build
from batchgen.spec.tasks import task_named
from batchgen.stages.decode import Decoder
from batchgen.stages.denoise import Denoiser
from batchgen.stages.encode import Encoder, sample_generator

Array = np.ndarray[Any, Any]
PROMPTS = ("a red star", "a blue circle", "a red star", "seven")
B = 3


class FamilyStages:
    """The three stages of one model, composed as the actors of either layout do.

    ``model`` and ``sampling`` are fields of those sections of the spec, and ``compiled`` is
    ``resources.compile``.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        batch_size: int = B,
        sampling: Mapping[str, Any] | None = None,
        compiled: str | None = None,
        **model: Any,
    ) -> None:
        columns = {part: part for part in task_named(task).needs}
        self.spec = build(
            {
                "input": {"path": "in.parquet", "columns": columns},
                "output": {"url": "out"},
                "task": task,
                "model": {"path": str(folder), "dtype": "float32", **model},
                "sampling": dict(sampling or {}),
                "resources": {"batch_size": batch_size, "compile": compiled},
            }
        )
        self.info = models.inspect(self.spec.model, task)
        self.encode: Encoder = models.load_encoder(self.info, self.spec)
        self.denoise: Denoiser = models.load_denoiser(self.info, self.spec)
        self.decode: Decoder = models.load_decoder(self.info, self.spec)

    def fused(self, batch: ConditionBatch) -> ImageBatch:
        return self.decode(self.denoise(self.encode(batch)))

    def staged(self, batch: ConditionBatch) -> ImageBatch:
        """Run the stages with their results converted to bytes and back, as between pools."""
        encoded = tensor_bytes.encoded_from_bytes(
            tensor_bytes.encoded_to_bytes([self.encode(batch)])
        )
        latents = [self.denoise(one) for one in encoded]
        (arrived,) = tensor_bytes.latents_from_bytes(tensor_bytes.latents_to_bytes(latents))
        return self.decode(arrived)

    def parts(self) -> dict[str, set[str]]:
        """Which components with parameters each stage holds."""
        stages = {"encoder": self.encode, "denoiser": self.denoise, "decoder": self.decode}
        return {name: set(models.parameter_counts(stage)) for name, stage in stages.items()}


def sample(row: int, call: Call, **values: Any) -> Sample:
    """A sample that depends on its row number alone; ``values`` replace its fields."""
    made = Sample(
        key=f"row{row}",
        source_id=str(row),
        row=row,
        variant=0,
        seed=derive_seed(5, f"row{row}"),
        prompt=PROMPTS[row % len(PROMPTS)],
        negative_prompt="grey",
        call=call,
    )
    return replace(made, **values)


def call(**settings: Any) -> Call:
    """Few steps at 32 x 32, with guidance."""
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "strength": None}
    return Call(**{**given, "width": 32, "height": 32, **settings})


def batch(
    rows: Sequence[int],
    shared: Call,
    images: Mapping[str, Sequence[Array]] | None = None,
    **values: Any,
) -> ConditionBatch:
    """A micro-batch of the given rows; ``images`` has one array a row for every part."""
    samples = tuple(sample(row, shared, **values) for row in rows)
    return ConditionBatch(samples, {part: tuple(each) for part, each in (images or {}).items()})


def picture(number: int, width: int = 32, height: int = 32) -> Array:
    """uint8 RGB (height, width, 3)."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(number: int, width: int = 32, height: int = 32) -> Array:
    """uint8 (height, width), 255 in a box that differs by number."""
    drawn = np.zeros((height, width), dtype=np.uint8)
    drawn[4 + number : height // 2 + number, 8 : width - 4] = 255
    return drawn


def pil(array: Array) -> Image.Image:
    return Image.fromarray(array)


def generators(given: ConditionBatch) -> list[torch.Generator]:
    """One a sample, as a user of diffusers would make them."""
    return [sample_generator(one) for one in given.samples]


def as_array(images: Sequence[Image.Image]) -> Array:
    """PIL images as uint8 (n, H, W, 3)."""
    return np.stack([np.asarray(one.convert("RGB")) for one in images])


def check_family(
    family: Family, stages: FamilyStages, given: ConditionBatch, plain: Array, furthest: int = 0
) -> None:
    """What holds of every family, on a full micro-batch and the plain pipeline's pixels for it.

    Fused and staged give the plain call's pixels (``furthest`` levels away at most: 0, unless the
    test says why not); each stage holds its own parts alone; a sample's pixels depend neither on
    its neighbours, nor its place, nor on padding; the images are no constant.
    """
    assert len(given.samples) == stages.denoise.batch_size, "give a full micro-batch"
    fused = stages.fused(given).pixels
    assert fused.std() > 5
    difference = np.abs(fused.astype(int) - plain.astype(int)).max()
    assert difference <= furthest, f"{difference} levels from the plain pipeline"
    assert np.array_equal(stages.staged(given).pixels, fused)
    last = len(given.samples) - 1
    alone = ConditionBatch(
        given.samples[last:], {part: each[last:] for part, each in given.images.items()}
    )
    assert np.array_equal(stages.fused(alone).pixels[0], fused[last])
    allowed = {name: set(getattr(family, name)) for name in ("encoder", "denoiser", "decoder")}
    for name, held in stages.parts().items():
        assert held <= allowed[name], f"the {name} holds {held - allowed[name]} as well"
    assert stages.info.family == family.name
