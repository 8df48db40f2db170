"""The pipelines of the latent diffusion paper, and DiT: equal to the plain pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families.ldm import FAMILIES
from batchgen.models.own import ClassEmbedder
from batchgen.models.tiny import ldm as tiny
from batchgen.records import ConditionBatch
from batchgen.spec.model import Model
from batchgen.stages.encode import sample_generator
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

FAMILY = {family.name: family for family in FAMILIES}
TASK = {family.name: family.task for family in FAMILIES}
SHARED = {
    "ldm": call(),
    "dit": call(),
    "ldm-class": call(),
    "ldm-bert": call(),
    "ldm-super-resolution": call(width=128, height=128),
}
LABELS = (2, 0, 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> a tiny model's folder; ``ldm-kl`` is the one with AutoencoderKL and DDPM."""
    builders = {name: build for (_, name), build in tiny.BUILDERS.items()}
    builders["ldm-kl"] = tiny.build_unconditional_kl
    return cache(lambda name: builders[name](tmp_path_factory.mktemp("models") / name))


def changed(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a model whose JSON ``file`` has these values; None takes one away."""
    shutil.copytree(folder, copy)
    tree = json.loads((copy / file).read_text()) | values
    kept = {key: value for key, value in tree.items() if value is not None}
    (copy / file).write_text(json.dumps(kept))
    return copy


def conditions(name: str, rows: Sequence[int]) -> dict[str, Any]:
    """What a batch of the family carries beside prompts."""
    if name == "ldm-super-resolution":
        return {"images": {"image": [picture(row, 32, 32) for row in rows]}}
    return {}


def plain_pipeline(folder: Path, name: str, **parts: Any) -> Any:
    if name == "ldm-class":
        parts |= {"tokenizer": None, "text_encoder": None}
    pipeline = getattr(diffusers, FAMILY[name].pipeline).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def labelled(given: ConditionBatch) -> ConditionBatch:
    """The same, every sample of a class of its own."""
    samples = [replace(one, class_label=LABELS[one.row % 3]) for one in given.samples]
    return ConditionBatch(tuple(samples), given.images)


def low(image: Array) -> torch.Tensor:
    """As LDMSuperResolutionPipeline makes a tensor of a PIL image."""
    from diffusers.pipelines.latent_diffusion import (
        pipeline_latent_diffusion_superresolution as library,
    )

    tensor: torch.Tensor = library.preprocess(pil(image))
    return tensor


def arguments(name: str, given: ConditionBatch, folder: Path) -> dict[str, Any]:
    """Of the plain pipeline's call; strings and class numbers where it takes them."""
    shared = given.call
    scale = {"guidance_scale": shared.guidance_scale}
    if name in ("ldm", "ldm-kl"):
        return {"batch_size": len(given.samples)}
    if name == "dit":
        return {"class_labels": [one.class_label for one in given.samples], **scale}
    if name == "ldm-bert":
        prompts = [one.prompt for one in given.samples]
        return {"prompt": prompts, "width": shared.width, "height": shared.height, **scale}
    if name == "ldm-class":
        table = ClassEmbedder.from_pretrained(folder / "class_embedder").embedding.weight.detach()
        rows = [one.class_label for one in given.samples]
        return {
            "prompt_embeds": table[rows][:, None],
            "negative_prompt_embeds": table[[-1] * len(rows)][:, None],
            **scale,
        }
    return {"image": torch.cat([low(image) for image in given.images["image"]])}


def given_for(name: str, rows: Sequence[int], **settings: Any) -> ConditionBatch:
    shared = replace(SHARED[name], **settings)
    made = batch(rows, shared, **conditions(name, rows))
    return labelled(made) if TASK[name] == "class-conditional" else made


def latents_of(pipeline: Any, name: str, **more: Any) -> tuple[torch.Tensor, Array]:
    """What the plain call gives its autoencoder to decode, and its images."""
    vae = getattr(pipeline, FAMILY[name].vae)
    decode, seen = vae.decode, []

    def seeing(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(latents)
        return decode(latents, *args, **options)

    vae.decode = seeing
    images = pipeline(num_inference_steps=3, **more).images
    return seen[0], as_array(images)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("ldm", 3.0),
        ("dit", 3.0),
        ("dit", 1.0),
        ("ldm-class", 3.0),
        ("ldm-class", 1.0),
        ("ldm-bert", 3.0),
        ("ldm-bert", 1.0),
        ("ldm-bert", 0.5),
        ("ldm-super-resolution", 3.0),
    ],
)
def test_equal_to_the_plain_pipeline(
    folder: Callable[[str], Path], name: str, guidance: float
) -> None:
    given = given_for(name, [0, 1, 2], guidance_scale=guidance)
    stages = FamilyStages(folder(name), TASK[name])
    pipeline = plain_pipeline(folder(name), name)
    more = arguments(name, given, folder(name))
    latents, images = latents_of(pipeline, name, generator=generators(given), **more)
    check_family(FAMILY[name], stages, given, images)
    ours = stages.denoise(stages.encode(given)).latents
    if name == "ldm-class":  # the one whose latents are still scaled
        ours = ours / pipeline.vae.config.scaling_factor
    assert torch.equal(ours, latents)


@pytest.mark.parametrize(
    ("name", "scheduler", "eta"),
    [
        ("ldm", None, 0.8),
        ("ldm-kl", None, 0.0),  # DDPM
        ("dit", "DDPMScheduler", 0.0),
        ("ldm-bert", None, 0.8),
        ("ldm-super-resolution", None, 0.8),
    ],
)
def test_fresh_noise_in_every_step_is_the_samples_own(
    folder: Callable[[str], Path], name: str, scheduler: str | None, eta: float
) -> None:
    # These pipelines draw it from torch's global generator. So one sample is compared with a plain
    # call that draws everything there, the generator being in the sample's first state.
    family = name.removesuffix("-kl")
    given = given_for(family, [1], eta=eta)
    more = {"scheduler": scheduler} if scheduler else {}
    stages = FamilyStages(folder(name), TASK[family], batch_size=1, **more)
    pipeline = plain_pipeline(folder(name), family)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    with torch.random.fork_rng():
        torch.set_rng_state(sample_generator(given.samples[0]).get_state())
        _, images = latents_of(
            pipeline,
            family,
            **arguments(name, given, folder(name)),
            **({"eta": eta} if eta else {}),
        )
    check_family(FAMILY[family], stages, given, images)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = FamilyStages(folder(name), TASK[family], **more)
    first = together.fused(given_for(family, [0, 1, 2], eta=eta)).pixels
    again = together.fused(given_for(family, [1, 2, 0], eta=eta)).pixels
    assert np.array_equal(first[1], again[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_eta_reaches_the_pipelines(folder: Callable[[str], Path]) -> None:
    for name in ("ldm", "ldm-class", "ldm-bert", "ldm-super-resolution"):
        assert "eta" in FAMILY[name].settings
        stages = FamilyStages(folder(name), TASK[name])
        still, moved = (stages.fused(given_for(name, [0], eta=eta)).pixels for eta in (0.0, 1.0))
        assert not np.array_equal(still, moved), name


def test_the_class_matters(folder: Callable[[str], Path]) -> None:
    for name in ("dit", "ldm-class"):
        stages = FamilyStages(folder(name), "class-conditional")
        made = [
            stages.fused(batch([0], call(guidance_scale=scale), class_label=label)).pixels
            for scale, label in ((3.0, 0), (3.0, 2), (1.0, 0))
        ]
        assert not np.array_equal(made[0], made[1]), name
        assert not np.array_equal(made[0], made[2]), name


def test_class_names(folder: Callable[[str], Path]) -> None:
    embedded = models.inspect(Model(path=str(folder("ldm-class"))), "class-conditional")
    assert embedded.class_names == tiny.CLASSES
    transformer = models.inspect(Model(path=str(folder("dit"))), "class-conditional")
    assert transformer.class_names[:4] == (*tiny.CLASSES, "")
    assert len(transformer.class_names) == 1000
    assert transformer.fixed_size


def test_the_text_matters_and_its_negative_does_not(folder: Callable[[str], Path]) -> None:
    stages = FamilyStages(folder("ldm-bert"), "text-to-image")

    def pixels(prompt: str, negative: str = "", scale: float = 3.0) -> Array:
        given = batch(
            [0], call(guidance_scale=scale), prompt=prompt, negative_prompt=negative, seed=5
        )
        return stages.fused(given).pixels

    assert not np.array_equal(pixels("a red star"), pixels("a blue circle"))
    assert not np.array_equal(pixels("a red star"), pixels("a red star", scale=1.0))
    assert np.array_equal(pixels("a red star"), pixels("a red star", "grey"))
    truncated = stages.encode(batch([0], call(), prompt="a" * 76)).truncated
    assert truncated == (True,)
    assert stages.encode(batch([0], call(), prompt="a" * 75)).truncated == (False,)


def test_the_small_image_matters(folder: Callable[[str], Path]) -> None:
    stages = FamilyStages(folder("ldm-super-resolution"), "super-resolution")
    shared = SHARED["ldm-super-resolution"]
    one, other = (batch([0], shared, {"image": [picture(n)]}) for n in range(2))
    assert stages.encode(one).conditions["image"].dtype == torch.uint8
    assert not np.array_equal(stages.fused(one).pixels, stages.fused(other).pixels)


def test_super_resolution_of_a_wide_pil_image(folder: Callable[[str], Path]) -> None:
    stages = FamilyStages(folder("ldm-super-resolution"), "super-resolution", batch_size=1)
    assert (stages.info.upscale, stages.info.multiple_of) == (4, 128)
    assert (stages.info.width, stages.info.height) == (128, 128)
    given = batch([0], call(width=256, height=128), {"image": [picture(3, 64, 32)]})
    pipeline = plain_pipeline(folder("ldm-super-resolution"), "ldm-super-resolution")
    (image,) = given.images["image"]
    images = pipeline(pil(image), num_inference_steps=3, generator=generators(given)).images
    check_family(FAMILY["ldm-super-resolution"], stages, given, as_array(images))


def test_the_seed_matters(folder: Callable[[str], Path]) -> None:
    for name in FAMILY:
        stages = FamilyStages(folder(name), TASK[name])
        rows = [
            batch([0], SHARED[name], **conditions(name, [0]), class_label=0, seed=seed)
            for seed in (5, 6)
        ]
        one, other = (stages.fused(given).pixels for given in rows)
        assert not np.array_equal(one, other), name


def test_no_call_depends_on_the_one_before(folder: Callable[[str], Path]) -> None:
    # LDMPipeline asks its scheduler for the size of the noise before it plans the steps
    stages = FamilyStages(folder("ldm"), "unconditional", scheduler="EulerDiscreteScheduler")
    first = stages.fused(given_for("ldm", [0])).pixels
    stages.fused(given_for("ldm", [0], num_inference_steps=2))
    assert np.array_equal(stages.fused(given_for("ldm", [0])).pixels, first)


def test_the_unconditional_model_runs_in_bfloat16(folder: Callable[[str], Path]) -> None:
    # which the plain LDMPipeline does not: its latents are float32
    pipeline = plain_pipeline(folder("ldm"), "ldm", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="type"):
        pipeline(num_inference_steps=1)
    made = FamilyStages(folder("ldm"), "unconditional", dtype="bfloat16").fused(
        given_for("ldm", [0, 1, 2])
    )
    assert made.finite == (True, True, True)
    assert made.pixels.std() > 5


def test_text_to_image_with_an_autoencoder_of_factor_4(tmp_path: Path) -> None:
    # of which the plain pipeline, which divides by 8 in any case, makes images of half the size
    model = tiny.build_bert(tmp_path / "model")
    tiny.autoencoder(4).save_pretrained(model / "vqvae")
    stages = FamilyStages(model, "text-to-image")
    given = batch([0, 1, 2], call(width=16, height=32))
    assert stages.info.multiple_of == 4
    images = plain_pipeline(model, "ldm-bert")(
        [one.prompt for one in given.samples],
        width=32,
        height=64,
        guidance_scale=3.0,
        num_inference_steps=3,
        generator=generators(given),
    ).images
    assert stages.fused(given).pixels.shape == (3, 32, 16, 3)
    check_family(FAMILY["ldm-bert"], stages, given, as_array(images))


def test_dit_of_few_classes_is_not_guided(tmp_path: Path) -> None:
    model = tiny.build_dit(tmp_path / "model")
    small = diffusers.DiTTransformer2DModel.from_config(
        diffusers.DiTTransformer2DModel.load_config(model / "transformer"), num_embeds_ada_norm=3
    )
    small.save_pretrained(model / "transformer")
    stages = FamilyStages(model, "class-conditional")
    assert stages.info.class_names == tiny.CLASSES
    unguided = batch([0], call(guidance_scale=1.0), class_label=1)
    assert stages.fused(unguided).pixels.std() > 5
    with pytest.raises(ValueError, match="has 3 classes, but guidance needs 1000"):
        stages.fused(batch([0], call(), class_label=1))


def test_schedulers_that_start_from_larger_noise(folder: Callable[[str], Path]) -> None:
    for name in ("dit", "ldm-bert"):
        with pytest.raises(ModelError, match=r"EulerDiscreteScheduler: .* works only with DDIM"):
            FamilyStages(folder(name), TASK[name], scheduler="EulerDiscreteScheduler")
        same = FamilyStages(folder(name), TASK[name], scheduler="DPMSolverMultistepScheduler")
        assert same.fused(given_for(name, [0])).pixels.std() > 5


def refusal(model: Path, task: str) -> str:
    with pytest.raises(ModelError) as caught:
        models.inspect(Model(path=str(model)), task)
    return str(caught.value)


def test_models_of_another_kind_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    index = "model_index.json"
    no_classes = changed(folder("ldm-class"), tmp_path / "a", index, class_embedder=None)
    assert "class_embedder: " in refusal(no_classes, "class-conditional")
    foreign = changed(folder("ldm-class"), tmp_path / "b", index, class_embedder=["batchgen", "X"])
    assert "lists the class batchgen.X; allowed" in refusal(foreign, "class-conditional")
    no_bert = changed(folder("ldm-bert"), tmp_path / "c", index, bert=None)
    assert "bert: " in refusal(no_bert, "text-to-image")
    wide = changed(folder("ldm"), tmp_path / "d", "unet/config.json", in_channels=6)
    assert "unet takes 6 channels, but a ldm model" in refusal(wide, "unconditional")
    narrow = changed(
        folder("ldm-super-resolution"), tmp_path / "e", "unet/config.json", in_channels=3
    )
    assert "unet takes 3 channels" in refusal(narrow, "super-resolution")
    four = changed(
        folder("ldm-super-resolution"), tmp_path / "f", "vqvae/config.json", latent_channels=4
    )
    assert "takes 8" in refusal(four, "super-resolution")
    assert "it fits unconditional" in refusal(folder("ldm"), "text-to-image")
