"""The values that stages receive and return, and what is known of model and device
before the model is loaded.

    ShardRows -> ConditionBatch -> EncodedBatch -> LatentBatch -> ImageBatch -> files and a marker
                 (one micro-batch each; n real samples, n <= batch size)

Tensors and arrays hold only the n real samples; each stage pads them to the fixed batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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
    """Settings of one library call; all samples of a micro-batch share them.

    A setting that the task or the pipeline does not support is None. Width and height are those of
    the generated image, in pixels.

    Attributes:
        eta: the fraction of fresh noise in DDIM (Song et al., 2021); other schedulers ignore it.
        noise_level: noise added to the conditioning image: super-resolution, unCLIP.
        control_scale: weight of each control image.
        image_prompt_scale: weight of an image prompt (IP-Adapter).
        denoising_end: fraction of the noise schedule that the base model does before the refiner.
        scheduler: a class name; None means the run's scheduler.
        lora: (name, weight) of the active adapters, sorted by name; None if the run loads none.
        regions: (phrase, (x0, y0, x1, y1) as fractions of the image's size) for layouts.
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
    """Restore a call from JSON: lists become tuples again."""
    return Call(**{name: tupled(value) for name, value in values.items()})


def tupled(value: Any) -> Any:
    """The value with its lists, at every depth, replaced by tuples."""
    return tuple(tupled(one) for one in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Sample:
    """One image to generate: (row, variant).

    ``row`` is the position in the shard's table. ``seed`` (63 bit) is derived from the run seed
    and the key, or from the row's seed column; never from the position in a batch.
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
    """The rows of one pending shard, as read from the input.

    The shard holds the samples ``first_sample`` to ``stop_sample - 1`` of the dataset. Sample g is
    variant ``g % variants`` of row ``g // variants``, counting rows through the files in plan
    order; a part of the output counts from its own first row and variant. ``table`` holds the
    source columns of those rows; ``source_ids`` and ``row_keys`` have one entry per row of it, and
    so have ``variants`` if each row has one listed sample.
    """

    shard: int
    first_sample: int
    stop_sample: int
    table: pa.Table
    source_ids: tuple[str, ...]
    row_keys: tuple[str, ...]
    read_bytes: int
    variants: tuple[int, ...] = ()


@dataclass(frozen=True)
class ConditionBatch:
    """The encoder's input: samples of one call and their conditioning images, if the task has any.

    ``images``: part (``image``, ``mask``, ``control``, ``control_1``, ...) -> one array per
    sample, already at its planned size: uint8 RGB (height, width, 3), or for masks uint8
    (height, width).
    """

    samples: tuple[Sample, ...]
    images: dict[str, tuple[np.ndarray[Any, Any], ...]]

    @property
    def call(self) -> Call:
        return self.samples[0].call


@dataclass(frozen=True)
class EncodedBatch:
    """The denoiser's input: encoded conditions, with each unique prompt once.

    Attributes:
        prompts: name -> (U, ...) tensors of the U unique prompts and negative prompts.
        prompt_index: n positions in ``prompts``; empty for a task without prompts.
        negative_index: n positions in ``prompts``; None if the call runs without guidance.
        conditions: name -> (n, ...) tensors of the conditioning images.
        labels: n class numbers, or empty.
        generator_states: (n, 5056) uint8, state of each sample's CPU generator after this stage.
        truncated: for each sample, whether its prompt was too long for the text encoder.
    """

    call: Call
    prompts: dict[str, torch.Tensor]
    prompt_index: tuple[int, ...]
    negative_index: tuple[int, ...] | None
    conditions: dict[str, torch.Tensor]
    labels: tuple[int, ...]
    generator_states: torch.Tensor
    truncated: tuple[bool, ...]

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors on the stage's device."""
        yield from self.prompts.values()
        yield from self.conditions.values()

    def take(self, places: list[int]) -> EncodedBatch:
        """The samples at these positions, with all of the prompts."""
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
    """Denoised latents (n, C, H/f, W/f), still scaled as the denoiser uses them."""

    call: Call
    latents: torch.Tensor
    truncated: tuple[bool, ...]

    def take(self, places: list[int]) -> LatentBatch:
        """The samples at these positions."""
        return LatentBatch(self.call, self.latents[places], _at(self.truncated, places))


@dataclass(frozen=True)
class ImageBatch:
    """Decoded pixels, uint8 RGB (n, height, width, 3).

    ``finite``: for each sample, whether its decoded values had no NaN or infinity.
    """

    pixels: np.ndarray[Any, Any]
    finite: tuple[bool, ...]
    truncated: tuple[bool, ...]


def _at(values: tuple[One, ...], places: list[int]) -> tuple[One, ...]:
    return tuple(values[place] for place in places) if values else ()


def micro_batches(samples: Iterable[Sample], batch_size: int) -> list[tuple[Sample, ...]]:
    """Cut a shard's samples into micro-batches of at most ``batch_size`` samples of one call each.

    Calls are ordered by their first sample, and samples keep their order within a call, so the
    result depends only on the samples.
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
class DeviceInfo:
    """The device that a plan is made for: the weakest that its replicas may get.

    Attributes:
        name: the driver's name (``NVIDIA L40S``) or Ray's (``L40S``); ``CPU`` if it is no GPU.
        memory_bytes: of one GPU; 0 if it is not known, and for the CPU.
        capability: CUDA compute capability; None if it is not known, and for other devices.
    """

    name: str = "CPU"
    memory_bytes: int = 0
    capability: tuple[int, int] | None = None

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it; stored in the plan.

    Attributes:
        model_id: the name, folder, Hub id or URL as the user gave it, without credentials.
        path: the local folder of the model, or the local file of its weights.
        revision: the Hub's commit, or ``sha256:`` and the first digits of ``manifest_sha256``.
        manifest_sha256: over name, size and SHA-256 of every file that would be loaded.
        pipeline_class: the diffusers class that saved the folder.
        family: name of the family that runs the model for this task.
        scheduler: class name of the scheduler in use.
        latent_channels: C of the latents (C, height / f, width / f).
        vae_scale_factor: f.
        width: the denoiser's native width in pixels.
        height: the denoiser's native height in pixels.
        multiple_of: width and height must be multiples of this.
        num_inference_steps: recommended by the model, else by its family.
        guidance_scale: recommended by the model, else by its family.
        class_names: for class-conditional models, the name of each class ("" if it has none).
        controls: number of control images that a call needs.
        optional_control: a call may have one control image.
        needs: parts of ``input.columns`` that must be mapped in addition to those of the task.
        upscale: factor from the conditioning image's width and height to the generated image's.
        fixed_size: only images of the native size can be generated.
        settings: settings of a call that the pipeline supports, besides steps, guidance and size.
        strength: the default if neither the spec nor the row sets it.
        schedulers: class names that the pipeline's loop supports; empty if it supports all.
        min_steps: with fewer steps the pipeline ignores a condition or fails.
        guidable: whether the model supports guidance.
        max_noise_level: highest noise level on the conditioning image that it was trained for.
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
