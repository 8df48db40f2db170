"""The plain pipelines of the Stable Diffusion line, as a user of diffusers calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from batchgen.families import family_named
from batchgen.records import ConditionBatch
from tests.family_stages import Array, FamilyStages, as_array, check_family, generators, pil


class Plain:
    """One plain pipeline; ``scheduler`` names a class that takes the place of the model's own."""

    def __init__(self, name: str, folder: Path, scheduler: str | None = None) -> None:
        self.pipeline = getattr(diffusers, name).from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        if scheduler is not None:
            scheduler_class = getattr(diffusers, scheduler)
            self.pipeline.scheduler = scheduler_class.from_config(self.pipeline.scheduler.config)

    def latents(self, given: ConditionBatch, **more: Any) -> torch.Tensor:
        found: torch.Tensor = self._call(given, output_type="latent", **more)
        return found

    def pixels(self, given: ConditionBatch, **more: Any) -> Array:
        return as_array(self._call(given, **more))

    def _call(self, given: ConditionBatch, **more: Any) -> Any:
        call = given.call
        images = {
            name: [pil(image) for image in given.images[part]]
            for part, name in (("image", "image"), ("mask", "mask_image"))
            if part in given.images
        }
        with torch.no_grad():
            arguments = {
                **self.prompts(given),
                **images,
                "num_inference_steps": call.num_inference_steps,
                "guidance_scale": call.guidance_scale,
                "generator": generators(given),
                **more,
            }
            return self.pipeline(**arguments).images

    def prompts(self, given: ConditionBatch) -> dict[str, torch.Tensor]:
        """Encoded one by one; negative ones without guidance too, which the pipelines ignore."""
        positive = torch.cat([self._encoded(one.prompt) for one in given.samples])
        if type(self.pipeline).__name__.startswith("LatentConsistency"):
            return {"prompt_embeds": positive}
        negative = torch.cat([self._encoded(one.negative_prompt) for one in given.samples])
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _encoded(self, prompt: str) -> torch.Tensor:
        if not hasattr(self.pipeline, "encode_prompt"):
            return torch.as_tensor(self.pipeline._encode_prompt(prompt, "cpu", 1, False))
        return torch.as_tensor(self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0])


def check_equal(
    name: str,
    stages: FamilyStages,
    plain: Plain,
    given: ConditionBatch,
    furthest: int = 0,
    **more: Any,
) -> None:
    """Everything of ``check_family``, and latents equal to the last bit; ``more``: of the call."""
    ours = stages.denoise(stages.encode(given)).latents
    assert torch.equal(ours, plain.latents(given, **more))
    pixels = plain.pixels(given, **more)
    check_family(family_named(stages.spec.task, name), stages, given, pixels, furthest)
