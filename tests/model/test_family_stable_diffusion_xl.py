"""Stable Diffusion XL, every task: equal to the plain pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families.stable_diffusion_xl import FAMILIES
from batchgen.models.tiny import BUILDERS
from batchgen.models.tiny import stable_diffusion_xl as tiny
from batchgen.records import ConditionBatch
from batchgen.spec.model import Model
from tests.family_stages import (
    Array,
    FamilyStages,
    as_array,
    batch,
    call,
    check_family,
    generators,
    mask,
    picture,
    pil,
)

BY_TASK = {family.task: family for family in FAMILIES}
CLASSES = {task: getattr(diffusers, family.pipeline) for task, family in BY_TASK.items()}
ROWS = [0, 1, 2]
ANCESTRAL = "EulerAncestralDiscreteScheduler"  # draws from the generators at every step

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Kind of tiny model -> its folder, made once."""
    parent = tmp_path_factory.mktemp("models")

    def built(kind: str) -> Path:
        if not (parent / kind).is_dir():
            getattr(tiny, f"build_{kind}")(parent / kind)
        return parent / kind

    return built


def plain_pipeline(folder: Path, task: str, scheduler: str | None = None) -> Any:
    pipeline = CLASSES[task].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    return pipeline


def plain_call(pipeline: Any, given: ConditionBatch, output_type: str, **more: Any) -> Any:
    """As a user of diffusers would call it, with the prompts encoded one by one."""
    shared = given.call
    guided = shared.guidance_scale > 1
    each = [
        pipeline.encode_prompt(
            one.prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=one.negative_prompt or None,
        )
        for one in given.samples
    ]
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = {
        name: torch.cat(tensors)
        for name, *tensors in zip(names, *each, strict=True)
        if tensors[0] is not None
    }
    images = {
        {"mask": "mask_image"}.get(part, part): [pil(one) for one in arrays]
        for part, arrays in given.images.items()
    }
    return pipeline(
        **embeds,
        **images,
        guidance_scale=shared.guidance_scale,
        num_inference_steps=shared.num_inference_steps,
        generator=generators(given),
        output_type=output_type,
        **more,
    ).images


def check(
    folder: Path, task: str, given: ConditionBatch, scheduler: str | None = None, **more: Any
) -> FamilyStages:
    """Pixels and latents are the plain pipeline's; ``more`` are its arguments."""
    stages = FamilyStages(folder, task, scheduler=scheduler)
    plain = plain_pipeline(folder, task, scheduler)
    images = plain_call(plain, given, "pil", **more)
    check_family(BY_TASK[task], stages, given, as_array(images))
    latents = stages.denoise(stages.encode(given)).latents
    assert torch.equal(latents, plain_call(plain, given, "latent", **more))
    return stages


def images(*parts: str, first: int = 0) -> dict[str, list[Array]]:
    """Three images a part, other ones for another ``first``."""
    made = {"image": picture, "mask": mask}
    return {part: [made[part](first + row) for row in ROWS] for part in parts}


SIZED = {"width": 32, "height": 32}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_to_image(folders: Folders, guidance: float) -> None:
    given = batch(ROWS, call(guidance_scale=guidance))
    check(folders("base"), "text-to-image", given, **SIZED)


def test_text_to_image_of_another_size(folders: Folders) -> None:
    given = batch(ROWS, call(width=40, height=24))
    check(folders("base"), "text-to-image", given, width=40, height=24)


def test_turbo_makes_one_step_without_guidance(folders: Folders) -> None:
    given = batch(ROWS, call(guidance_scale=0.0, num_inference_steps=1))
    stages = check(folders("turbo"), "text-to-image", given, **SIZED)
    encoded = stages.encode(given)
    assert encoded.negative_index is None
    assert stages.info.scheduler == ANCESTRAL


def test_an_empty_negative_prompt_is_what_the_model_says(folders: Folders, tmp_path: Path) -> None:
    given = batch(ROWS, call(), negative_prompt="")
    zeros = check(folders("base"), "text-to-image", given, **SIZED)
    encoded = zeros.encode(given)
    assert encoded.negative_index is not None
    for tensor in encoded.prompts.values():
        assert not tensor[encoded.negative_index[0]].any()

    tiny.build_base(tmp_path)
    edit_json(tmp_path / "model_index.json", force_zeros_for_empty_prompt=False)
    words = check(tmp_path, "text-to-image", given, **SIZED)
    assert not np.array_equal(words.fused(given).pixels, zeros.fused(given).pixels)


@pytest.mark.parametrize("scheduler", [None, ANCESTRAL])
@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_image_to_image(folders: Folders, kind: str, scheduler: str | None) -> None:
    given = batch(ROWS, call(strength=0.7), images("image"))
    stages = check(folders(kind), "image-to-image", given, scheduler, strength=0.7)
    encoders = {"text_encoder_2"} if kind == "refiner" else {"text_encoder", "text_encoder_2"}
    assert stages.parts()["encoder"] == {*encoders, "vae"}


def test_the_refiner_encodes_an_empty_negative_prompt(folders: Folders) -> None:
    given = batch(ROWS, call(strength=0.7), images("image"), negative_prompt="")
    check(folders("refiner"), "image-to-image", given, strength=0.7)


@pytest.mark.parametrize("scheduler", [None, ANCESTRAL])
@pytest.mark.parametrize("strength", [None, 1.0, 0.7])
@pytest.mark.parametrize("kind", ["base", "inpainting"])
def test_inpainting(
    folders: Folders, kind: str, strength: float | None, scheduler: str | None
) -> None:
    given = batch(ROWS, call(strength=strength), images("image", "mask"))
    more = {} if strength is None else {"strength": strength}
    check(folders(kind), "inpainting", given, scheduler, **SIZED, **more)


@pytest.mark.parametrize(
    ("guidance", "image_guidance"), [(3.0, 2.0), (3.0, None), (1.0, 1.5), (3.0, 0.5)]
)
def test_image_edit(folders: Folders, guidance: float, image_guidance: float | None) -> None:
    shared = call(guidance_scale=guidance, image_guidance_scale=image_guidance)
    given = batch(ROWS, shared, images("image"))
    more = {} if image_guidance is None else {"image_guidance_scale": image_guidance}
    stages = check(folders("edit"), "image-edit", given, **SIZED, **more)
    guided = guidance > 1 and image_guidance != 0.5
    assert (stages.encode(given).negative_index is not None) == guided


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_latents_with_statistics_of_their_own(tmp_path: Path, task: str) -> None:
    """As Playground v2.5 has them: latents are shifted and scaled channel by channel."""
    tiny.build_base(tmp_path)
    statistics = {"latents_mean": [-1.6, 1.1, 0.3, -2.6], "latents_std": [8.4, 5.9, 5.3, 5.1]}
    edit_json(tmp_path / "vae" / "config.json", **statistics)
    if task == "text-to-image":
        check(tmp_path, task, batch(ROWS, call()), **SIZED)
    else:
        given = batch(ROWS, call(strength=0.7), images("image"))
        check(tmp_path, task, given, strength=0.7)


@pytest.mark.parametrize("kind", ["base", "inpainting", "edit"])
def test_a_half_precision_vae_that_overflows_is_raised(folders: Folders, kind: str) -> None:
    """As the plain pipelines do; on this device float16 itself is close, not equal."""
    task = {"base": "image-to-image", "edit": "image-edit"}.get(kind, kind)
    stages = FamilyStages(folders(kind), task, dtype="float16")
    part = stages.decode.pipeline.vae
    assert part.config.force_upcast and part.dtype == torch.float16
    seen = []
    part.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    encoder = stages.encode.pipeline.vae
    encoder.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    shared = call(strength=0.7 if task != "image-edit" else None)
    given = batch(ROWS, shared, images(*(["image", "mask"] if kind == "inpainting" else ["image"])))
    half = stages.fused(given).pixels
    assert set(seen) == {torch.float32}
    assert part.dtype == encoder.dtype == torch.float16
    full = FamilyStages(folders(kind), task).fused(given).pixels
    assert np.abs(half.astype(int) - full.astype(int)).mean() < 2


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-to-image", "base"),
        ("image-to-image", "base"),
        ("inpainting", "inpainting"),
        ("image-edit", "edit"),
    ],
)
def test_every_condition_matters(folders: Folders, task: str, kind: str) -> None:
    parts = {"image-to-image": ["image"], "inpainting": ["image", "mask"], "image-edit": ["image"]}
    needed = parts.get(task, [])
    shared = call(strength=0.7 if "strength" in BY_TASK[task].settings else None)
    stages = FamilyStages(folders(kind), task)

    def pixels(given: ConditionBatch) -> Array:
        return stages.fused(given).pixels

    before = pixels(batch(ROWS, shared, images(*needed)))
    for changed in ({"prompt": "four"}, {"negative_prompt": "four"}, {"seed": 9}):
        after = pixels(batch(ROWS, shared, images(*needed), **changed))
        assert not np.array_equal(after, before), changed
    for part in needed:
        given = images(*needed) | images(part, first=4)
        assert not np.array_equal(pixels(batch(ROWS, shared, given)), before), part
    settings: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 4}
    settings |= {"strength": 1.0} if "strength" in BY_TASK[task].settings else {}
    settings |= {"image_guidance_scale": 2.5} if task == "image-edit" else {}
    for name, value in settings.items():
        given = batch(ROWS, replace(shared, **{name: value}), images(*needed))
        assert not np.array_equal(pixels(given), before), name
    noisy = FamilyStages(folders(kind), task, scheduler="DDIMScheduler")
    still = noisy.fused(batch(ROWS, shared, images(*needed))).pixels
    stirred = noisy.fused(batch(ROWS, replace(shared, eta=1.0), images(*needed))).pixels
    assert not np.array_equal(still, stirred)


def test_variants_of_a_row_share_the_encoded_image(folders: Folders) -> None:
    stages = FamilyStages(folders("inpainting"), "inpainting")
    calls = []
    stages.encode.pipeline.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    image, cut = picture(0), mask(0)
    stages.encode(
        batch(ROWS, call(), {"image": [image, image, picture(1)], "mask": [cut, cut, cut]})
    )
    assert len(calls) == 4  # two images, whole and masked


@pytest.mark.parametrize(("task", "strength"), [("image-to-image", 0.2), ("inpainting", 0.2)])
def test_a_strength_that_leaves_no_step_is_refused(
    folders: Folders, task: str, strength: float
) -> None:
    stages = FamilyStages(folders("base"), task)
    parts = ["image", "mask"] if task == "inpainting" else ["image"]
    with pytest.raises(ValueError, match="leaves no step"):
        stages.fused(batch(ROWS, call(strength=strength), images(*parts)))


def test_what_cannot_serve_a_task_is_refused(folders: Folders, tmp_path: Path) -> None:
    def refusal(folder: Path, task: str) -> str:
        with pytest.raises(ModelError) as refused:
            models.inspect(Model(path=str(folder)), task)
        return str(refused.value)

    tiny.build_refiner(tmp_path / "refiner")
    edit_json(tmp_path / "refiner" / "model_index.json", text_encoder_2=[None, None])
    assert "text_encoder_2: " in refusal(tmp_path / "refiner", "image-to-image")
    assert "tokenizer: " in refusal(folders("refiner"), "text-to-image")
    tiny.build_base(tmp_path / "base")
    edit_json(tmp_path / "base" / "model_index.json", tokenizer=[None, None])
    edit_json(tmp_path / "base" / "model_index.json", text_encoder=[None, None])
    refused = "unet takes text embeddings of width 64, but text_encoder_2 gives 32"
    assert refused in refusal(tmp_path / "base", "image-to-image")
    assert "unet takes 9 channels" in refusal(folders("inpainting"), "text-to-image")
    assert "it fits inpainting" in refusal(folders("inpainting"), "image-to-image")
    assert "is a StableDiffusionXLPipeline" in refusal(folders("base"), "image-edit")
    assert "it fits image-edit" in refusal(folders("edit"), "image-to-image")


def test_builders_make_models_that_serve_their_task(folders: Folders, tmp_path: Path) -> None:
    for (task, name), build in BUILDERS.items():
        if name == "stable-diffusion-xl":
            folder = build(tmp_path / task)
            assert models.inspect(Model(path=str(folder)), task).family == name


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
