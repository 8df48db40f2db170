"""Stable Diffusion 1 and 2, every task: equal to the plain pipelines."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from batchgen.families.stable_diffusion import FAMILIES
from tests.family_stages import (
    FamilyStages,
    as_array,
    batch,
    call,
    check_family,
    generators,
    picture,
    pil,
)
from tests.tiny_models import build_model

BY_TASK = {family.task: family for family in FAMILIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


def test_image_to_image(folder: Path) -> None:
    given = batch([0, 1, 2], call(strength=0.7), {"image": [picture(n) for n in range(3)]})
    stages = FamilyStages(folder, "image-to-image")
    plain = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    embeds = [plain.encode_prompt(one.prompt, "cpu", 1, True, "grey") for one in given.samples]
    images = plain(
        prompt_embeds=torch.cat([positive for positive, _ in embeds]),
        negative_prompt_embeds=torch.cat([negative for _, negative in embeds]),
        image=[pil(image) for image in given.images["image"]],
        strength=0.7,
        guidance_scale=3.0,
        num_inference_steps=3,
        generator=generators(given),
    ).images
    check_family(BY_TASK["image-to-image"], stages, given, as_array(images))
