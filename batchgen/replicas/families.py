"""Which pipelines and schedulers can be used: tables, and what is said of anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.errors import ModelError, nearest

# Library of a component -> the stem of its weight files.
WEIGHT_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True)
class Family:
    """Pipelines that share their parts and differ by task.

    Attributes:
        pipelines: task -> diffusers class. A folder saved from any of them serves every task.
        weighted: components with a configuration and weights.
        others: component -> its configuration file; these have no weights.
        image_latent_channels: by this count the image task's pipeline tells latents from pixels.
    """

    pipelines: Mapping[str, str]
    weighted: tuple[str, ...]
    others: Mapping[str, str]
    image_latent_channels: int

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all components that are loaded."""
        return (*self.others, *self.weighted)


FAMILIES = (
    Family(
        pipelines={
            "text-to-image": "StableDiffusionPipeline",
            "image-to-image": "StableDiffusionImg2ImgPipeline",
        },
        weighted=("text_encoder", "unet", "vae"),
        others={"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"},
        image_latent_channels=4,
    ),
)

# Each is tested to give a sample the same bytes whatever its neighbours are.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_OWN_NOISE = "it draws noise from a generator of its own, so a sample's seed does not fix its image"
REFUSED_SCHEDULERS = {
    "DPMSolverSDEScheduler": _OWN_NOISE,
    "CosineDPMSolverMultistepScheduler": _OWN_NOISE,
}


def check_scheduler(name: str) -> str:
    """The name back, if it is a scheduler that can be used. Imports nothing.

    Raises:
        ModelError: refused (with the reason) or unknown (with the nearest known name).
    """
    if name in REFUSED_SCHEDULERS:
        raise ModelError(f"scheduler {name} cannot be used: {REFUSED_SCHEDULERS[name]}")
    if name not in SCHEDULERS:
        hint = nearest(name, SCHEDULERS)
        raise ModelError(f"scheduler: got {name!r}; allowed: {', '.join(SCHEDULERS)}{hint}")
    return name


def family_of(pipeline_class: object, task: str, where: str) -> Family:
    """The family that a saved pipeline belongs to, if it serves the task.

    Raises:
        ModelError: no family does; names the classes that would.
    """
    serving = [family for family in FAMILIES if task in family.pipelines]
    for family in serving:
        if pipeline_class in family.pipelines.values():
            return family
    known = ", ".join(sorted(name for family in serving for name in family.pipelines.values()))
    raise ModelError(f"model {where} is a {pipeline_class}; allowed for {task}: {known or 'none'}")


def weight_globs(stem: str, variant: str | None) -> list[str]:
    """File patterns of one component's safetensors weights, whole or in parts."""
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????.{variant}.safetensors",
    ]
