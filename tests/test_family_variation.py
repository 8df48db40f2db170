"""Image variations: equal to the plain pipelines, and each condition tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from batchgen.families.variation import FAMILIES
from batchgen.records import Call, ConditionBatch
from batchgen.replicas.tiny.variation import BUILDERS
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

TASK = "variation"
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a tiny model's folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for (_, name), build in BUILDERS.items()}


def three(shared: Call, **values: Any) -> ConditionBatch:
    """Three rows, each with an image of its own, not square and larger than the output."""
    images = {"image": [picture(row, 48, 40) for row in range(3)]}
    return batch([0, 1, 2], shared, images, **values)


def pictures(given: ConditionBatch) -> list[Any]:
    return [pil(image) for image in given.images["image"]]


def embeds_of(pipeline: Any, given: ConditionBatch) -> dict[str, torch.Tensor]:
    """The prompts' embeddings, encoded one by one."""
    each = [
        pipeline.encode_prompt(one.prompt, "cpu", 1, True, one.negative_prompt)
        for one in given.samples
    ]
    return {
        "prompt_embeds": torch.cat([positive for positive, _ in each]),
        "negative_prompt_embeds": torch.cat([negative for _, negative in each]),
    }


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_image_variation(folders: dict[str, Path], guidance: float) -> None:
    given = three(call(guidance_scale=guidance, eta=0.0))
    stages = FamilyStages(folders["image-variation"], TASK)
    plain = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(
        folders["image-variation"], safety_checker=None, requires_safety_checker=False
    )
    images = plain(
        image=pictures(given),
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=generators(given),
    ).images
    check_family(BY_NAME["image-variation"], stages, given, as_array(images))


@pytest.mark.parametrize(("guidance", "noise_level"), [(3.0, None), (3.0, 400), (1.0, 20)])
def test_unclip(folders: dict[str, Path], guidance: float, noise_level: int | None) -> None:
    given = three(call(guidance_scale=guidance, noise_level=noise_level, eta=0.5))
    stages = FamilyStages(folders["unclip"], TASK)
    plain = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(folders["unclip"])
    embeds = embeds_of(plain, given)
    images = plain(
        image=pictures(given),
        **(embeds if guidance > 1 else {"prompt_embeds": embeds["prompt_embeds"]}),
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=generators(given),
        noise_level=noise_level or 0,
        eta=0.5,
    ).images
    check_family(BY_NAME["unclip"], stages, given, as_array(images))
