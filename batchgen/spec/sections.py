"""The sections of the spec except model and storage: input, sampling, output, resources, policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from batchgen.errors import SpecError
from batchgen.spec.approximate import Approximate
from batchgen.spec.faults import NEEDED, Faults, missing
from batchgen.spec.model import AUTO, COUNTED_IF_SET, FREE, NotCounted, OnlyWith, Section
from batchgen.spec.quota_section import Remake

MIN_SIZE, MAX_SIZE = 8, 4096
MAX_TEXT = 10_000  # characters of a prompt; the longest text encoder here reads less than half
USUAL_BATCH = 8  # on a CPU, and on GPUs whose memory is not known
MAX_COUNT = 10**10  # the plan has one entry for each 65,536 rows

Eta = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Noise = Annotated[int, Field(ge=0, le=1000)]
Scale = Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)]

Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
Strength = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE, multiple_of=8)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Stage = Literal["encode", "denoise", "decode"]


class Columns(Section):
    """Which input column holds which part of a row. A part that is null is not read."""

    prompt: str | None = Field(
        default=None, description="default: `prompt`, for tasks that read prompts"
    )
    negative_prompt: str | None = None
    class_label: str | None = Field(default=None, description="class numbers or names")
    image: str | None = None
    mask: str | None = Field(default=None, description="white areas are repainted")
    control: str | tuple[str, ...] | None = Field(
        default=None, description="control images, one column for each ControlNet"
    )
    regions: str | None = Field(default=None, description="layout: a list of {phrase, box}")
    key: str | None = None
    label: str | None = None
    seed: str | None = None
    num_inference_steps: str | None = None
    guidance_scale: str | None = None
    strength: str | None = None
    width: str | None = None
    height: str | None = None
    eta: str | None = None
    image_guidance_scale: str | None = None
    noise_level: str | None = None
    control_scale: str | None = None
    image_prompt_scale: str | None = None
    scheduler: str | None = None
    lora: str | None = Field(default=None, description="`name:weight,name:weight`, or empty")
    objects: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="labelled objects of the image: boxes, polygons, masks, keypoints"
    )
    label_mask: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="label masks: images whose pixels are class numbers"
    )
    new_category: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="the category of objects that inpainting repaints"
    )
    image_width: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="width in pixels of the labelled image, if no image is read"
    )
    image_height: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="the same for its height"
    )

    split: Annotated[str | None, COUNTED_IF_SET] = Field(
        default=None, description="train, validation or test; with input.splits: `split`"
    )

    def mapped(self) -> dict[str, str]:
        """Map each part that is read from the data to its column.

        Several control images are named ``control``, ``control_1`` and so on.
        """
        parts = {part: getattr(self, part) for part in type(self).model_fields}
        several = parts.pop("control")
        controls = (several,) if isinstance(several, str) else several or ()
        parts |= {control_part(number): column for number, column in enumerate(controls)}
        return {part: column for part, column in parts.items() if column is not None}


def control_part(number: int) -> str:
    """Name the part of the control image with this number."""
    return f"control_{number}" if number else "control"


class Input(Section):
    """Where the rows come from: a Parquet file, a folder of them or a glob, on any fsspec URL."""

    path: str = ""
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description="number of rows to generate without an input dataset"
    )
    columns: Columns = Columns()
    keep_columns: tuple[str, ...] | None = Field(
        default=None,
        description="source columns to copy to the output; null: all except conditioning images",
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="use only the first rows of the dataset"
    )
    splits: Annotated[tuple[str, ...] | None, COUNTED_IF_SET] = Field(
        default=None, min_length=1, description="only rows of these splits, such as [train]"
    )
    check_keys: Annotated[bool, FREE] = Field(
        default=True, description="read the key column while planning and refuse duplicates"
    )
    uri_roots: tuple[str, ...] | None = Field(
        default=None,
        description="allowed locations of images that rows name by URI: folders, buckets "
        "(s3://bucket) or schemes (https://); null: the input's own folder or bucket",
    )
    uri_limit_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 64 << 20
    image_limit_pixels: Annotated[int, Field(ge=1, le=128 << 20), FREE] = Field(
        default=64 << 20, description="images with more pixels are rejected; 64 Mi is 8192 x 8192"
    )
    uri_timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False), FREE] = 60.0

    @model_validator(mode="after")
    def _one_source(self) -> Input:
        if not self.path and self.count is None:
            raise Faults([missing("input.path", NEEDED["input"])])
        if self.path and self.count is not None:
            both = "input.path is set as well; remove one of the two"
            raise Faults([SpecError("input.count", self.count, "null", because=both)])
        mapped = self.columns.mapped() if self.count is not None else {}
        none = "input.count generates rows without columns; remove it, or use input.path"
        faults = [
            SpecError(f"input.columns.{one}", name, "null", because=none)
            for one, name in mapped.items()
        ]
        if faults:
            raise Faults(faults)
        return self


class Sampling(Section):
    """Settings of every sample; a column of ``input.columns`` overrides them row by row.

    Planning replaces nulls by the model's recommended settings and its own size.
    """

    num_inference_steps: Steps | None = Field(default=None, description="denoising steps")
    guidance_scale: Guidance | None = Field(
        default=None, description="how closely the prompt is followed"
    )
    strength: Strength | None = Field(
        default=None, description="how much of the source image is replaced by noise, 0 to 1"
    )
    width: Size | None = Field(default=None, description="pixels")
    height: Size | None = Field(default=None, description="pixels")
    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    eta: Eta = Field(default=0.0, description="fraction of fresh noise in DDIM")
    image_guidance_scale: Guidance = Field(
        default=1.5, description="how closely the source image is kept"
    )
    noise_level: Noise | None = Field(
        default=None, description="noise added to the condition; null: the pipeline's default"
    )
    control_scale: Scale | tuple[Scale, ...] = Field(
        default=1.0, description="weight of the control images, one for all or one for each"
    )
    image_prompt_scale: Scale = Field(default=1.0, description="weight of an image prompt")
    denoising_end: OpenFraction = Field(
        default=0.8, description="with a refiner: fraction of the schedule that the base model runs"
    )
    lora: str | None = Field(
        default=None, description="`name:weight,...` of model.loras; null: all, at their weights"
    )
    approximate: Approximate = Approximate()


class Made(Section):
    """A condition computed from an image by a classical method (``batchgen tasks control``)."""

    name: str
    options: dict[str, float] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class Conditioning(Section):
    """How conditioning images are resized to the size of the call, and converted by makers."""

    resize: Literal["fill", "fit", "stretch", "multiple-of"] = Field(
        default="fill",
        description="fill: cover the size, crop about the centre; fit: fit inside, pad; stretch: "
        "ignore the aspect ratio; multiple-of: keep each image's size, crop it to a multiple that "
        "the model supports",
    )
    make: dict[str, Made] = Field(
        default={},
        description="image part (image, control, control_1, ...) -> the maker that converts it",
    )


class Output(Section):
    """Where images are written, and in which format."""

    url: Annotated[str, FREE]
    format: Literal["parquet", "webdataset", "image-folder"] = "parquet"
    samples_per_shard: Annotated[int, Field(ge=1, le=100_000)] = 64
    image_format: Literal["png", "jpeg", "webp"] = "png"
    image_quality: Annotated[
        int, Field(ge=1, le=100), OnlyWith("image_format", ("jpeg", "webp"))
    ] = 95
    jpeg_subsampling: Annotated[
        Literal["4:4:4", "4:2:2", "4:2:0"], OnlyWith("image_format", ("jpeg",))
    ] = Field(default="4:4:4", description="chroma subsampling of JPEG output")
    license: Annotated[str, FREE] = "unknown"
    provenance: Annotated[Literal["xmp", "none"] | None, NotCounted((None, "none"))] = Field(
        default=None,
        description="xmp: mark each image file as made by a generative model, in the terms of "
        "IPTC; null: xmp, for new outputs",
    )
    signed: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False,
        description="images are signed with C2PA; only `batchgen export --sign` sets it",
    )


class Pool(Section):
    """The replicas of one stage. CPUs and GPUs that are null are chosen from the cluster's."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    num_cpus: Annotated[float, Field(gt=0)] | None = None
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="for each replica: a fraction of one GPU, or several GPUs over which its "
        "largest model is divided",
    )
    accelerator_type: str | None = Field(
        default=None, description="use only nodes with this GPU, by Ray's name: L40S, H100"
    )
    resources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="custom Ray resources that a replica reserves, name -> amount"
    )
    stuck_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=1800.0,
        description="a replica that finishes no micro-batch for this long is restarted",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) of at least min_replicas ({self.min_replicas})"
            )
        return self

    @field_validator("num_gpus")
    @classmethod
    def _shared_or_whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("a fraction of one GPU (up to 1), or a whole number of GPUs")
        return value


class Resources(Section):
    """How the stages are divided over actors.

    The sizes of calls, ``compile`` and ``torch_threads`` are part of the fingerprint, since a
    sample's bytes are reproducible only with a fixed batch shape, kernels and thread count.
    """

    layout: Annotated[Literal["fused", "staged"], FREE] = "fused"
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default=AUTO, description="images in a call of U-Net and VAE; auto: for the GPU's memory"
    )
    decode_batch_size: Annotated[Annotated[int, Field(ge=1, le=1024)] | None, COUNTED_IF_SET] = (
        Field(default=None, description="samples in a call of the VAE's decoder; null: batch_size")
    )
    vae_tiling: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False, description="decode large images in overlapping tiles, to save memory"
    )
    compile: Annotated[Literal["regional", "full"] | None, COUNTED_IF_SET] = Field(
        default=None,
        description="compile the denoiser and the VAE's decoder with torch.compile; regional: of "
        "the denoiser only its repeated blocks, which takes less time",
    )
    torch_threads: Annotated[int, Field(ge=1, le=256)] = 1
    shards_in_flight: Annotated[int, Field(ge=1, le=8), FREE] = Field(
        default=2,
        description="shards that an actor works on at a time, to overlap device work and upload",
    )
    offload: Annotated[tuple[Stage, ...], FREE] = Field(
        default=(),
        description="stages whose weights stay in host memory, and are copied to the GPU as they "
        "are needed: encode, denoise, decode",
    )
    generate: Annotated[Pool, FREE] = Pool()
    encode: Annotated[Pool, FREE] = Pool()
    denoise: Annotated[Pool, FREE] = Pool()
    decode: Annotated[Pool, FREE] = Pool()

    @property
    def pools(self) -> dict[str, Pool]:
        """Name -> pool, for the pools of the layout."""
        names = ("generate",) if self.layout == "fused" else ("encode", "denoise", "decode")
        return {name: getattr(self, name) for name in names}

    def pool_of(self, stage: str) -> tuple[str, Pool]:
        """The pool of the layout whose replicas hold this stage, with its name."""
        name = "generate" if self.layout == "fused" else stage
        return name, self.pools[name]

    @property
    def may_use_gpus(self) -> bool:
        """Whether any pool of the layout may run on GPUs."""
        return any(pool.num_gpus != 0 for pool in self.pools.values())

    @field_validator("offload")
    @classmethod
    def _each_stage_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each stage at most once")
        return value

    @model_validator(mode="after")
    def _slices(self) -> Resources:
        batch = self.batch_size
        if batch != AUTO and self.decode_batch_size is not None and self.decode_batch_size > batch:
            raise ValueError(
                f"decode_batch_size ({self.decode_batch_size}) of at most batch_size ({batch})"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """``batch_size`` as a number; in a plan it is never ``auto``."""
        usual = max(USUAL_BATCH, self.decode_batch_size or 0)
        return self.batch_size if isinstance(self.batch_size, int) else usual

    @property
    def decode_size(self) -> int:
        """Number of samples in each call of the VAE's decoder."""
        return self.decode_batch_size or self.micro_batch


class Policy(Section):
    """When to retry, reject or stop."""

    failed_limit: Annotated[Fraction, FREE] = Field(
        default=0.01, description="fraction of the finished samples that may fail"
    )
    rejected_limit: Annotated[Fraction, FREE] = Field(
        default=0.1, description="fraction of the planned samples that may be rejected"
    )
    shard_retries: Annotated[int, Field(ge=0, le=100), FREE] = 2
    reject_flat: bool = Field(default=True, description="reject images that have only one colour")
    reject_blank: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False, description="reject images that are blank by the scorer quality"
    )
    reject_dark: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False, description="the same for images that are dark"
    )
    reject_blurred: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False, description="the same for images that are blurred"
    )
    nsfw: Annotated[Literal["off", "flag", "reject"], COUNTED_IF_SET] = Field(
        default="off",
        description="images that are unsafe by the scorer nsfw: flag counts them in the markers, "
        "reject rejects them",
    )
    remake: Annotated[Remake | None, FREE] = Field(
        default=None, description="make rejected samples again, with other seeds"
    )
