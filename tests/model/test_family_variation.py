"""Image variations: equal to the plain pipelines, and every condition has an effect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchgen.families.variation import FAMILIES
from batchgen.models.tiny.parts import seeded
from batchgen.models.tiny.variation import BUILDERS, save_ip_adapter
from batchgen.records import Call, ConditionBatch
from tests.family_stages import (
    Array,
    FamilyStages,
    as_array,
    batch,
    call,
    check_family,
    generators,
    picture,
    pil,
)
from tests.model_folders import edit, refusal

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


@torch.no_grad()
def embeds_of(pipeline: Any, given: ConditionBatch, guided: bool) -> dict[str, torch.Tensor]:
    """The prompts' embeddings, encoded one by one; of SDXL the pooled ones as well."""
    names = ("prompt_embeds", "negative_prompt_embeds")
    if hasattr(pipeline, "text_encoder_2"):
        names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    each = [
        pipeline.encode_prompt(
            prompt=one.prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=one.negative_prompt,
        )
        for one in given.samples
    ]
    joined = {name: torch.cat([one[place] for one in each]) for place, name in enumerate(names)}
    return {name: one for name, one in joined.items() if guided or "negative" not in name}


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
    images = plain(
        image=pictures(given),
        **embeds_of(plain, given, guidance > 1),
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=generators(given),
        noise_level=noise_level or 0,
        eta=0.5,
    ).images
    check_family(BY_NAME["unclip"], stages, given, as_array(images))


def ip_adapter(folder: Path) -> dict[str, Any]:
    return {"ip_adapter": {"path": str(folder / "ip_adapter")}}


@pytest.mark.parametrize(("guidance", "scale"), [(3.0, None), (3.0, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["ip-adapter", "ip-adapter-xl"])
def test_ip_adapter(
    folders: dict[str, Path], name: str, guidance: float, scale: float | None
) -> None:
    """The plain call shows one image to all samples: each row is compared with its own call."""
    given = three(call(guidance_scale=guidance, image_prompt_scale=scale))
    stages = FamilyStages(folders[name], TASK, **ip_adapter(folders[name]))
    plain = getattr(diffusers, BY_NAME[name].pipeline).from_pretrained(folders[name])
    plain.load_ip_adapter(
        str(folders[name] / "ip_adapter"),
        subfolder="",
        weight_name=next((folders[name] / "ip_adapter").glob("*.safetensors")).name,
    )
    plain.set_ip_adapter_scale(1.0 if scale is None else scale)
    images = []
    for row, image in enumerate(pictures(given)):
        made = plain(
            **embeds_of(plain, given, guidance > 1),
            ip_adapter_image=image,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=generators(given),
        ).images
        images.append(made[row])
    check_family(BY_NAME[name], stages, given, as_array(images))


def test_ip_adapter_plus(folders: dict[str, Path], tmp_path: Path) -> None:
    """It is given hidden states, and with guidance those of a black image as well."""
    folder = folders["ip-adapter"]
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with seeded():
        save_ip_adapter(unet, tmp_path, "plus.safetensors", plus=True)
    given = three(call())
    stages = FamilyStages(folder, TASK, ip_adapter={"path": str(tmp_path / "plus.safetensors")})
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    plain.load_ip_adapter(str(tmp_path), subfolder="", weight_name="plus.safetensors")
    images = [
        plain(
            **embeds_of(plain, given, True),
            ip_adapter_image=image,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=generators(given),
        ).images[row]
        for row, image in enumerate(pictures(given))
    ]
    check_family(BY_NAME["ip-adapter"], stages, given, as_array(images))


@pytest.fixture(scope="module")
def stages(folders: dict[str, Path]) -> dict[str, FamilyStages]:
    return {
        name: FamilyStages(folder, TASK, 1, **(ip_adapter(folder) if "ip-" in name else {}))
        for name, folder in folders.items()
    }


def pixels(stages: FamilyStages, image: int = 0, seed: int = 1, **settings: Any) -> Array:
    """One sample's pixels; ``settings`` are those of the call, or a prompt."""
    values = {name: settings.pop(name) for name in list(settings) if "prompt" in name[-6:]}
    images = {"image": [picture(image, 48, 40)]}
    made: Array = stages.fused(batch([0], call(**settings), images, seed=seed, **values)).pixels
    return made


@pytest.mark.parametrize("name", BY_NAME)
def test_each_condition_tells(stages: dict[str, FamilyStages], name: str) -> None:
    first = pixels(stages[name])
    assert np.array_equal(pixels(stages[name]), first)
    assert not np.array_equal(pixels(stages[name], image=1), first)
    assert not np.array_equal(pixels(stages[name], seed=2), first)
    assert not np.array_equal(pixels(stages[name], guidance_scale=4.0), first)
    if name != "image-variation":
        assert not np.array_equal(pixels(stages[name], prompt="seven"), first)
        assert not np.array_equal(pixels(stages[name], negative_prompt="blue"), first)


def test_a_size_of_the_call(stages: dict[str, FamilyStages]) -> None:
    for name, each in stages.items():
        assert pixels(each, width=40, height=24).shape == (1, 24, 40, 3), name


def test_settings_reach_the_pipeline(stages: dict[str, FamilyStages]) -> None:
    noised = [pixels(stages["unclip"], noise_level=level) for level in (None, 0, 10, 500)]
    assert np.array_equal(noised[0], noised[1])
    assert not np.array_equal(noised[1], noised[2])
    assert not np.array_equal(noised[2], noised[3])
    scaled = [pixels(stages["ip-adapter"], image_prompt_scale=one) for one in (None, 1, 0.5, 0)]
    assert np.array_equal(scaled[0], scaled[1])
    assert not np.array_equal(scaled[1], scaled[2])
    unseen = pixels(stages["ip-adapter"], image=1, image_prompt_scale=0.0)
    assert np.array_equal(unseen, scaled[3]), "at a weight of 0 the image is not seen"
    assert not np.array_equal(pixels(stages["unclip"], eta=0.9), noised[0])


def test_the_image_encoder_stays_where_it_is(stages: dict[str, FamilyStages]) -> None:
    assert stages["image-variation"].parts() == {
        "encoder": {"image_encoder"},
        "denoiser": {"unet"},
        "decoder": {"vae"},
    }
    assert stages["unclip"].parts()["denoiser"] == {"unet", "image_normalizer"}
    for name in ("ip-adapter", "ip-adapter-xl"):
        assert stages[name].parts()["denoiser"] == {"unet"}
        assert "image_encoder" in stages[name].parts()["encoder"]


def test_an_image_encoder_from_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["ip-adapter"]
    shutil.copy(folder / "ip_adapter" / "ip-adapter_sd15.safetensors", tmp_path)
    alone = {"ip_adapter": {"path": str(tmp_path)}}
    assert "image_encoder: " in refusal(folder, TASK, **alone)
    assert "set model.components.image_encoder" in refusal(folder, TASK, **alone)
    given = {"components": {"image_encoder": str(folder / "ip_adapter" / "image_encoder")}}
    made = pixels(FamilyStages(folder, TASK, 1, **alone, **given))
    root = {"ip_adapter": {"path": str(folder), "subfolder": "ip_adapter"}}
    beside = {"ip_adapter": {**root["ip_adapter"], "image_encoder": "ip_adapter/image_encoder"}}
    for other in (ip_adapter(folder), root, beside):
        assert np.array_equal(pixels(FamilyStages(folder, TASK, 1, **other)), made)


def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["ip-adapter"]
    assert "needs an IP-Adapter; set model.ip_adapter" in refusal(folder, TASK)
    told = refusal(folder, "text-to-image", **ip_adapter(folder))
    assert "model.ip_adapter: a stable-diffusion model for text-to-image does not" in told
    assert "it fits variation" in told
    other = refusal(folder, TASK, **ip_adapter(folders["ip-adapter-xl"]))
    assert (
        "gives embeddings of width 64, but the unet takes 32; it was trained for another model"
        in other
    )
    copied = shutil.copytree(folder / "ip_adapter", tmp_path / "ip_adapter")
    edit(copied / "image_encoder" / "config.json", projection_dim=16)
    assert "takes image embeddings of width 32, but the image encoder" in refusal(
        folder, TASK, **ip_adapter(tmp_path)
    )
    weights = copied / "ip-adapter_sd15.safetensors"
    save_file({"image_proj.norm.weight": torch.zeros(4), "ip_adapter.1.x": torch.zeros(4)}, weights)
    assert "face embeddings" in refusal(folder, TASK, **ip_adapter(tmp_path))
    save_file({"unet.x": torch.zeros(4)}, weights)
    assert "is not an IP-Adapter: it has unet.x" in refusal(folder, TASK, **ip_adapter(tmp_path))


def test_a_component_that_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["image-variation"], tmp_path / "model")
    edit(copied / "model_index.json", image_encoder=None)
    assert "image_encoder: " in refusal(copied, TASK)
    told = refusal(folders["unclip"], "text-to-image")
    assert "is a StableUnCLIPImg2ImgPipeline" in told
    assert "it fits variation" in told


def test_noise_levels_beyond_the_schedule(stages: dict[str, FamilyStages]) -> None:
    with pytest.raises(ValueError, match="between 0 and 999"):
        pixels(stages["unclip"], noise_level=1000)
