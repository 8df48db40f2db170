"""Stable Diffusion XL with its refiner: equal to the two plain pipelines, one after the other."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families.stable_diffusion_xl_refiner import FAMILIES
from batchgen.models.tiny import stable_diffusion_xl as tiny
from batchgen.records import ConditionBatch, ModelInfo
from batchgen.spec.model import Model
from tests.family_stages import FamilyStages, as_array, batch, call, check_family, generators

TASK = "text-to-image"
ROWS = [0, 1, 2]
ANCESTRAL = "EulerAncestralDiscreteScheduler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_ensemble(tmp_path_factory.mktemp("models") / "ensemble")


def stages_of(folder: Path, **model: Any) -> FamilyStages:
    return FamilyStages(folder, TASK, components={"refiner": str(folder / "refiner")}, **model)


def embeds(pipeline: Any, given: ConditionBatch) -> dict[str, torch.Tensor]:
    each = [
        pipeline.encode_prompt(
            one.prompt,
            do_classifier_free_guidance=given.call.guidance_scale > 1,
            negative_prompt=one.negative_prompt or None,
        )
        for one in given.samples
    ]
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    every = dict(zip(names, zip(*each, strict=True), strict=True))
    return {name: torch.cat(tensors) for name, tensors in every.items() if tensors[0] is not None}


def plain(folder: Path, given: ConditionBatch, end: float, scheduler: str | None = None) -> Any:
    """The two pipelines as the library's guide puts them together, each with its own scheduler."""
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder / "refiner")
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
        if scheduler is not None:
            made = getattr(diffusers, scheduler)
            pipeline.scheduler = made.from_config(pipeline.scheduler.config)
    refiner.vae = base.vae
    shared = {
        "num_inference_steps": given.call.num_inference_steps,
        "guidance_scale": given.call.guidance_scale,
        "generator": generators(given),
    }
    latents = base(
        **embeds(base, given),
        **shared,
        width=given.call.width,
        height=given.call.height,
        denoising_end=end,
        output_type="latent",
    ).images
    return refiner(**embeds(refiner, given), **shared, image=latents, denoising_start=end).images


@pytest.mark.parametrize(
    ("end", "scheduler", "settings"),
    [
        (None, None, {}),
        (0.5, None, {}),
        (0.5, ANCESTRAL, {}),
        (0.5, "HeunDiscreteScheduler", {}),
        (0.5, None, {"guidance_scale": 1.0}),
        (0.5, None, {"width": 40, "height": 24}),
    ],
)
def test_the_refiner_goes_on_from_the_base(
    folder: Path, end: float | None, scheduler: str | None, settings: dict[str, Any]
) -> None:
    given = batch(ROWS, call(**{"num_inference_steps": 5, "denoising_end": end, **settings}))
    stages = stages_of(folder, scheduler=scheduler)
    images = plain(folder, given, 0.8 if end is None else end, scheduler)
    check_parts_apart(stages)
    check_family(FAMILIES[0], stages, given, as_array(images))


def test_an_empty_negative_prompt_is_what_each_model_says(folder: Path) -> None:
    given = batch(ROWS, call(num_inference_steps=5), negative_prompt="")
    stages = stages_of(folder)
    check_family(FAMILIES[0], stages, given, as_array(plain(folder, given, 0.8)))
    encoded = stages.encode(given)
    assert encoded.negative_index is not None
    row = encoded.negative_index[0]
    assert not encoded.prompts["prompt_embeds"][row].any()
    assert encoded.prompts["refiner_prompt_embeds"][row].any()


def check_parts_apart(stages: FamilyStages) -> None:
    assert stages.parts() == {
        "encoder": {"text_encoder", "text_encoder_2", "refiner.text_encoder_2"},
        "denoiser": {"unet", "refiner.unet"},
        "decoder": {"vae"},
    }


def test_both_models_and_the_share_matter(folder: Path, tmp_path: Path) -> None:
    def pixels(stages: FamilyStages, **settings: Any) -> np.ndarray[Any, Any]:
        given = {"num_inference_steps": 5, "denoising_end": 0.5, **settings}
        return stages.fused(batch(ROWS, call(**given))).pixels

    stages = stages_of(folder)
    before = pixels(stages)
    assert not np.array_equal(pixels(stages, denoising_end=0.8), before)
    alone = FamilyStages(folder, TASK)
    assert alone.info.family == "stable-diffusion-xl"
    assert not np.array_equal(pixels(alone), before)
    shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "refiner")
    tiny.build_refiner(tmp_path / "other" / "refiner", seed=9)
    assert not np.array_equal(pixels(stages_of(tmp_path / "other")), before)


def test_a_share_that_leaves_one_of_them_no_step(folder: Path) -> None:
    """One step is either the base's or the refiner's; both are made."""
    stages = stages_of(folder)
    for end in (0.2, 0.99):
        given = batch(ROWS, call(num_inference_steps=1, denoising_end=end))
        assert np.array_equal(stages.fused(given).pixels, as_array(plain(folder, given, end)))


def test_the_spec_names_the_share_and_the_plan_the_refiner(folder: Path, tmp_path: Path) -> None:
    stages = stages_of(folder)
    assert stages.spec.sampling.denoising_end == 0.8
    assert "denoising_end" in stages.info.settings
    shutil.copytree(folder, tmp_path / "copy")
    index = tmp_path / "copy" / "refiner" / "model_index.json"
    index.write_text(index.read_text().replace("true", "false", 1))
    changed = stages_of_info(tmp_path / "copy")
    assert changed.manifest_sha256 != stages.info.manifest_sha256
    assert asdict(call(denoising_end=0.5))["denoising_end"] == 0.5


def stages_of_info(folder: Path) -> ModelInfo:
    model = Model(path=str(folder), components={"refiner": str(folder / "refiner")})
    return models.inspect(model, TASK)


def test_what_is_no_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    def refusal(base: Path, refiner: str) -> str:
        with pytest.raises(ModelError) as refused:
            models.inspect(Model(path=str(base), components={"refiner": refiner}), TASK)
        return str(refused.value)

    assert f"refiner: {folder} is a StableDiffusionXLPipeline" in refusal(folder, str(folder))
    assert "no such folder" in refusal(folder, str(tmp_path / "nowhere"))
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "refiner" / "text_encoder_2")
    message = refusal(tmp_path / "model", str(tmp_path / "model" / "refiner"))
    assert "text_encoder_2: " in message
    assert "is missing" in message
    shutil.rmtree(tmp_path / "model" / "refiner")
    wide = tiny.build_base(tmp_path / "model" / "refiner")
    index = wide / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"))
    refused = "refiner.unet takes text embeddings of width 64, but refiner.text_encoder_2 gives 32"
    assert refused in refusal(tmp_path / "model", str(wide))
