"""Approximate modes (``sampling.approximate``): faster sampling, of images that differ a little.

All of them are off by default. None lets a sample depend on its neighbours; those that do are
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from batchgen.errors import SpecError
from batchgen.spec.faults import Faults
from batchgen.spec.model import COUNTED_IF_SET, Section

FIELD = "sampling.approximate"
TINY_VAE = "tiny_vae"  # also the component in model.components
Part = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)]

# Modes that skip work if a mean over the complete micro-batch has hardly changed.
REFUSED = ("first_block_cache", "sea_cache", "tea_cache", "db_cache")
_OTHER_NAMES = ("fb_cache", "cache_dit", "dual_block_cache")
BY_BATCH = (
    "it decides by a mean over the complete micro-batch what to skip, so a sample would depend on "
    "its neighbours; use mag_cache or taylor_seer (Flux, Qwen-Image) or deep_cache (U-Nets)"
)


@dataclass(frozen=True)
class Method:
    """One approximate mode.

    Attributes:
        about: what it does, in a few words.
        paper: where it comes from.
        measured: what it cost on the shipped model, as its distance to the exact images, and what
            it saved (``benchmarks/approximate.py``); empty if that model cannot run it.
    """

    about: str
    paper: str
    measured: str = ""


UNMEASURED = "not measured"
METHODS: Mapping[str, Method] = {
    "guidance_interval": Method(
        "classifier-free guidance in a part of the steps; the others cost half",
        "Kynkäänniemi et al. 2024, arXiv:2404.07724",
        "guidance_interval 0.2-0.8 on digits-shapes, 12 steps, CPU: PSNR 29.2 dB, 1.12x as fast",
    ),
    "deep_cache": Method(
        "deep features of the U-Net are computed in every n-th step, and reused in the others",
        "Ma et al. 2023, arXiv:2312.00858",
        "deep_cache cache_interval=3 on digits-shapes, 12 steps, CPU: PSNR 24.8 dB, 1.59x as fast",
    ),
    "mag_cache": Method(
        "steps are skipped by the known magnitudes of the transformer's residuals",
        "Ma et al. 2025, arXiv:2506.09045",
    ),
    "taylor_seer": Method(
        "outputs of attention layers are extrapolated from earlier steps",
        "Liu et al. 2025, arXiv:2503.06923",
    ),
    TINY_VAE: Method(
        "a tiny autoencoder decodes the latents",
        "Bohan, TAESD, github.com/madebyollin/taesd",
    ),
}


class DeepCache(Section):
    """Reuse of a U-Net's deep features."""

    cache_interval: Annotated[int, Field(ge=2, le=100)] = Field(
        default=3, description="one of so many steps computes the complete U-Net"
    )


class MagCache(Section):
    """MagCache of diffusers: ``MagCacheConfig`` explains the fields."""

    threshold: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 0.06
    max_skip_steps: Annotated[int, Field(ge=1, le=100)] = 3
    retention_ratio: Part = 0.2
    mag_ratios: tuple[Ratio, ...] | None = Field(
        default=None,
        description="one for each step of the run that they were measured in; null: those of "
        "diffusers for Flux",
    )


class TaylorSeer(Section):
    """TaylorSeer of diffusers: ``TaylorSeerCacheConfig`` explains the fields."""

    cache_interval: Annotated[int, Field(ge=2, le=100)] = 5
    disable_cache_before_step: Annotated[int, Field(ge=1, le=1000)] = 3
    max_order: Annotated[int, Field(ge=0, le=3)] = 1


class Approximate(Section):
    """Which approximate modes a job uses; a mode that is null or false is off."""

    guidance_interval: Annotated[tuple[Part, Part] | None, COUNTED_IF_SET] = Field(
        default=None, description="guidance from this fraction of the steps to that one"
    )
    deep_cache: Annotated[DeepCache | None, COUNTED_IF_SET] = None
    mag_cache: Annotated[MagCache | None, COUNTED_IF_SET] = None
    taylor_seer: Annotated[TaylorSeer | None, COUNTED_IF_SET] = None
    tiny_vae: Annotated[bool, COUNTED_IF_SET] = Field(
        default=False, description=f"decode with the autoencoder in model.components.{TINY_VAE}"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Expand a name without options; refuse modes by which samples depend on neighbours."""
        if isinstance(value, str):
            value = {value: True if value == TINY_VAE else {}}
        if not isinstance(value, Mapping):
            return value
        refused = {one.replace("_", "") for one in (*REFUSED, *_OTHER_NAMES)}
        faults = [
            SpecError(f"{FIELD}.{name}", "on", "null", because=BY_BATCH)
            for name in value
            if re.sub("[_-]", "", str(name).lower()) in refused
        ]
        if faults:
            raise Faults(faults)
        return value

    @field_validator("deep_cache", "mag_cache", "taylor_seer", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        """True stands for a mode with its defaults, false for one that is off."""
        return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _goes_together(self) -> Approximate:
        faults = []
        interval = self.guidance_interval
        if interval is not None and not (interval[0] < interval[1] and interval != (0.0, 1.0)):
            allowed = "two fractions of the steps, the first below the second, but not 0 and 1"
            faults.append(SpecError(f"{FIELD}.guidance_interval", interval, allowed))
        if self.mag_cache is not None and self.taylor_seer is not None:
            because = "mag_cache is set as well; remove one of the two"
            faults.append(SpecError(f"{FIELD}.taylor_seer", "on", "null", because=because))
        if faults:
            raise Faults(faults)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The modes that are on, in a fixed order."""
        return tuple(name for name in METHODS if getattr(self, name) not in (None, False))

    @property
    def cycle(self) -> int:
        """The number of steps after which a call's memory no longer grows."""
        deep, mag, taylor = self.deep_cache, self.mag_cache, self.taylor_seer
        return max(
            2,
            deep.cache_interval + 1 if deep else 0,
            mag.max_skip_steps + 2 if mag else 0,
            taylor.disable_cache_before_step + taylor.cache_interval + 1 if taylor else 0,
        )

    @property
    def label(self) -> str:
        """The modes that are on, with their options, as the rows of the output have it."""
        return "; ".join(self.labels.values())

    @property
    def labels(self) -> dict[str, str]:
        """Mode -> its name with its options."""
        return {name: f"{name}{_options(getattr(self, name))}" for name in self.names}


def _options(mode: object) -> str:
    if isinstance(mode, tuple):
        return f" {mode[0]:g}-{mode[1]:g}"
    if not isinstance(mode, Section):
        return ""
    options = {
        name: f"{len(value)} numbers" if isinstance(value, tuple) else value
        for name, value in mode.model_dump().items()
        if value is not None
    }
    return "".join(f" {name}={value}" for name, value in options.items())
