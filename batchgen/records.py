"""The values on the arrows of the stream: what each stage is given and what it hands on.

    ShardRows -> ConditionBatch -> EncodedBatch -> LatentBatch -> ImageBatch -> files and a marker
                 (one micro-batch each; n real samples, n <= batch size)

Tensors and arrays hold the n real samples only; a stage pads to the fixed batch size itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

One = TypeVar("One")
GENERATOR_STATE_BYTES = 5056  # torch's CPU generator (mt19937)


@dataclass(frozen=True)
class Call:
    """Settings that are one value for a whole library call; a micro-batch shares them.

    A setting that the task or the pipeline does not take is None. Sizes are in pixels, those of
    the image to be made.

    Attributes:
        eta: the share of fresh noise in DDIM (Song et al., 2021); other schedulers ignore it.
        noise_level: noise added to the conditioning image: super-resolution, unCLIP.
        control_scale: weight of each control image.
        image_prompt_scale: weight of an image prompt (IP-Adapter).
        denoising_end: share of the noise schedule that the base model goes, before its refiner.
        scheduler: a class name; None stands for the run's own.
        lora: (name, weight) of the adapters in effect, by name; None where the run loads none.
        regions: (phrase, (x0, y0, x1, y1) in shares of the image) for layouts.
    """

    num_inference_steps: int
    guidance_scale: float
    strength: float | None
    width: int
    height: int
    eta: float = 0.0
    image_guidance_scale: float | None = None
    noise_level: int | None = None
    control_scale: tuple[float, ...] | None = None
    image_prompt_scale: float | None = None
    denoising_end: float | None = None
    scheduler: str | None = None
    lora: tuple[tuple[str, float], ...] | None = None
    regions: tuple[tuple[str, tuple[float, ...]], ...] | None = None


def call_from_json(values: dict[str, Any]) -> Call:
    """The call whose ``asdict`` went through JSON, which knows no tuples."""
    return Call(**{name: tupled(value) for name, value in values.items()})


def tupled(value: Any) -> Any:
    """A value that went through JSON, with tuples for its lists."""
    return tuple(tupled(one) for one in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Sample:
    """One image to make: (row, variant).

    ``row`` is the position in the shard's table. ``seed`` (63 bit) comes from the run seed and the
    key, or from the row's own seed column; never from the place in a batch.
    """

    key: str
    source_id: str
    row: int
    variant: int
    seed: int
    prompt: str
    negative_prompt: str
    call: Call
    class_label: int | None = None


@dataclass(frozen=True)
class Dropped:
    """A planned sample that is not in ``data/``: ``outcome`` is ``rejected`` or ``failed``."""

    key: str
    source_id: str
    variant: int
    outcome: str
    reason: str
    message: str


@dataclass(frozen=True)
class ShardRows:
    """The rows of one pending shard, as read.

    The shard is the samples ``first_sample`` to ``stop_sample - 1`` of the dataset, where sample g
    is variant ``g % variants`` of row ``g // variants`` (files in plan order, end to end).
    ``table`` holds those rows' source columns, and ``source_ids`` and ``row_keys`` name them.
    """

    shard: int
    first_sample: int
    stop_sample: int
    table: pa.Table
    source_ids: tuple[str, ...]
    row_keys: tuple[str, ...]
    read_bytes: int


@dataclass(frozen=True)
class ConditionBatch:
    """What the encoder is given: samples of one call and, for tasks with images, their images.

    ``images``: part (``image``, ``mask``, ``control``, ``control_1``, ...) -> one array a sample,
    already at its planned size: uint8 RGB (height, width, 3), or for masks uint8 (height, width).
    """

    samples: tuple[Sample, ...]
    images: dict[str, tuple[np.ndarray[Any, Any], ...]]

    @property
    def call(self) -> Call:
        return self.samples[0].call


@dataclass(frozen=True)
class EncodedBatch:
    """Conditions as the denoiser takes them, each unique prompt once.

    Attributes:
        prompts: name -> (U, ...) tensors of the unique prompts and negative prompts.
        prompt_index: n positions in ``prompts``; empty for a task without prompts.
        negative_index: n positions in ``prompts``; None when the call runs without guidance.
        conditions: name -> (n, ...) tensors of the conditioning images.
        labels: n class numbers, or empty.
        generator_states: (n, 5056) uint8, the CPU generators' state after this stage.
        truncated: for each sample, the prompt was longer than the text encoder reads.
    """

    call: Call
    prompts: dict[str, torch.Tensor]
    prompt_index: tuple[int, ...]
    negative_index: tuple[int, ...] | None
    conditions: dict[str, torch.Tensor]
    labels: tuple[int, ...]
    generator_states: torch.Tensor
    truncated: tuple[bool, ...]

    def take(self, places: list[int]) -> EncodedBatch:
        """The samples at these places, with all of the prompts."""
        negatives = self.negative_index
        return EncodedBatch(
            call=self.call,
            prompts=self.prompts,
            prompt_index=_at(self.prompt_index, places),
            negative_index=None if negatives is None else _at(negatives, places),
            conditions={name: tensor[places] for name, tensor in self.conditions.items()},
            labels=_at(self.labels, places),
            generator_states=self.generator_states[places],
            truncated=_at(self.truncated, places),
        )


@dataclass(frozen=True)
class LatentBatch:
    """Denoised latents (n, C, H/f, W/f), still scaled as the U-Net sees them."""

    call: Call
    latents: torch.Tensor
    truncated: tuple[bool, ...]

    def take(self, places: list[int]) -> LatentBatch:
        """The samples at these places."""
        return LatentBatch(self.call, self.latents[places], _at(self.truncated, places))


@dataclass(frozen=True)
class ImageBatch:
    """Decoded pixels, uint8 RGB (n, height, width, 3); ``finite``: no NaN or infinity."""

    pixels: np.ndarray[Any, Any]
    finite: tuple[bool, ...]
    truncated: tuple[bool, ...]


def _at(values: tuple[One, ...], places: list[int]) -> tuple[One, ...]:
    return tuple(values[place] for place in places) if values else ()


def micro_batches(samples: Iterable[Sample], batch_size: int) -> list[tuple[Sample, ...]]:
    """Cut a shard's samples into micro-batches of one call each, in order.

    Groups keep the order of their first sample and each group the samples' order, so the result
    depends on the samples alone.
    """
    groups: dict[Call, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.call, []).append(sample)
    return [
        tuple(group[start : start + batch_size])
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def derive_seed(run_seed: int, key: str) -> int:
    """The 63-bit seed of a sample: BLAKE2b of the run seed and the sample's key."""
    digest = hashlib.blake2b(f"{run_seed}\x1f{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it; goes into the plan.

    Attributes:
        model_id: the name, folder, hub id or URL as the user gave it, without credentials.
        path: the local folder it was found in, or the local file of its weights.
        revision: the hub's commit, or ``sha256:`` and the head of ``manifest_sha256``.
        manifest_sha256: over name, size and SHA-256 of every file that would be loaded.
        pipeline_class: the diffusers class the folder was saved from.
        family: name of the family that it serves the task as.
        scheduler: class name of the scheduler in effect.
        latent_channels: C of the latents (C, height / f, width / f).
        vae_scale_factor: f.
        width: the denoiser's native width in pixels.
        height: the denoiser's native height in pixels.
        multiple_of: what width and height must be multiples of.
        num_inference_steps: the model's own recommendation, or the family's.
        guidance_scale: the model's own recommendation, or the family's.
        class_names: for class-conditional models, the name of each class ("" if it has none).
        controls: how many control images a call takes.
        optional_control: a call may take one control image.
        needs: parts of ``input.columns`` that must be mapped, beside those that the task needs.
        upscale: pixels of an image made a pixel of the conditioning image, each way.
        fixed_size: images of the native size alone can be made.
        settings: settings of a call, beside steps, guidance and size, that the pipeline takes.
        strength: used where neither the spec nor the row names one.
        schedulers: those that the pipeline's loop is written for; empty: all.
        min_steps: with fewer the pipeline ignores a condition or fails.
        guidable: the model can be guided at all.
        max_noise_level: the most noise that it was trained to take on its condition.
    """

    model_id: str
    path: str
    revision: str
    manifest_sha256: str
    pipeline_class: str
    family: str
    scheduler: str
    latent_channels: int
    vae_scale_factor: int
    width: int
    height: int
    multiple_of: int
    num_inference_steps: int
    guidance_scale: float
    class_names: tuple[str, ...] = ()
    controls: int = 0
    upscale: int = 1
    fixed_size: bool = False
    settings: tuple[str, ...] = ()
    strength: float = 0.6
    optional_control: bool = False
    needs: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    min_steps: int = 1
    guidable: bool = True
    max_noise_level: int = 999
