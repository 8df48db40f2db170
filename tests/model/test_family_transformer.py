"""PixArt, Stable Diffusion 3, Flux, Sana, Qwen-Image, Z-Image: equal to the plain pipelines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen.families import family_named
from batchgen.models.tiny.transformer import BUILDERS, build_flux, build_stable_diffusion_3
from batchgen.records import ConditionBatch
from tests.family_stages import (
    Array,
    FamilyStages,
    as_array,
    batch,
    call,
    check_family,
    generators,
    picture,
    sample,
)
from tests.model_folders import IMAGE, TEXT, edit, inspect, refusal
from tests.transformer_calls import ONE_LENGTH, plain_call

FAMILIES = tuple(name for task, name in BUILDERS if task == TEXT)
FROM_IMAGES = tuple(name for task, name in BUILDERS if task == IMAGE)
GUIDED = tuple(name for name in FAMILIES if name != "flux")
WIDTH, HEIGHT = 48, 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each family."""
    made = tmp_path_factory.mktemp("models")
    return {name: BUILDERS[TEXT, name](made / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Any:
    """(family, task) -> its stages, loaded once."""
    known: dict[tuple[str, str], FamilyStages] = {}

    def stages(name: str, task: str = TEXT) -> FamilyStages:
        if (name, task) not in known:
            known[name, task] = FamilyStages(folders[name], task)
        return known[name, task]

    return stages


def size(name: str, **settings: Any) -> Any:
    """A call that is wider than high; Sana's latents are of 32 pixels."""
    scale = 2 if name == "sana" else 1
    return call(**{"width": WIDTH * scale, "height": HEIGHT * scale, **settings})


def pictures() -> dict[str, list[Array]]:
    return {"image": [picture(number, WIDTH, HEIGHT) for number in range(3)]}


def from_image(name: str, strength: float) -> Any:
    """Of five steps, these pipelines leave out 5 - 5 * strength, rounded down; with none left out
    they start from noise alone, whatever the image."""
    return size(name, strength=strength, num_inference_steps=5)


def check(
    name: str, task: str, folder: Path, stages: FamilyStages, given: ConditionBatch, **parts: Any
) -> None:
    """What holds of every family, and that latents equal the plain pipeline's to the last bit."""
    family = family_named(task, name)
    plain = getattr(diffusers, family.pipeline).from_pretrained(folder, **parts)
    plain.set_progress_bar_config(disable=True)
    latents = stages.denoise(stages.encode(given)).latents
    assert (latents - plain_call(name, plain, given, "latent")).abs().max() == 0
    check_family(family, stages, given, as_array(plain_call(name, plain, given)))


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_text_to_image(folders: dict[str, Path], loaded: Any, name: str, guidance: float) -> None:
    given = batch([0, 1, 2], size(name, guidance_scale=guidance))
    check(name, TEXT, folders[name], loaded(name), given)


def test_z_image_without_guidance(folders: dict[str, Path], loaded: Any) -> None:
    """Its scale of none is 0, and of 1 is guidance."""
    given = batch([0, 1, 2], size("z-image", guidance_scale=0.0))
    assert loaded("z-image").encode(given).negative_index is None
    check("z-image", TEXT, folders["z-image"], loaded("z-image"), given)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_image_to_image(folders: dict[str, Path], loaded: Any, name: str, strength: float) -> None:
    given = batch([0, 1, 2], from_image(name, strength), pictures())
    check(name, IMAGE, folders[name], loaded(name, IMAGE), given)


def test_flux_without_guidance_embeddings(tmp_path: Path) -> None:
    """As schnell: it ignores the scale."""
    folder = build_flux(tmp_path / "schnell", guidance_embeds=False)
    stages = FamilyStages(folder, TEXT)
    given = batch([0, 1, 2], size("flux"))
    check("flux", TEXT, folder, stages, given)
    other = batch([0, 1, 2], size("flux", guidance_scale=7.0))
    assert np.array_equal(stages.fused(given).pixels, stages.fused(other).pixels)


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_stable_diffusion_3_without_t5(tmp_path: Path, task: str) -> None:
    folder = build_stable_diffusion_3(tmp_path / "small", t5=False)
    stages = FamilyStages(folder, task)
    assert "text_encoder_3" not in stages.parts()["encoder"]
    shared = from_image("stable-diffusion-3", 0.6) if task == IMAGE else size("")
    given = batch([0, 1, 2], shared, pictures() if task == IMAGE else None)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    check("stable-diffusion-3", task, folder, stages, given, **absent)


# --- every condition and setting matters ---------------------------------------------------------


def differs(stages: FamilyStages, one: ConditionBatch, other: ConditionBatch) -> bool:
    return not np.array_equal(stages.fused(one).pixels, stages.fused(other).pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_seed_and_steps_matter(loaded: Any, name: str) -> None:
    stages, shared = loaded(name), size(name)
    given = batch([0], shared)
    assert differs(stages, given, batch([0], shared, prompt="a blue dog"))
    assert differs(stages, given, batch([0], shared, seed=sample(0, shared).seed + 1))
    assert differs(stages, given, batch([0], size(name, num_inference_steps=2)))
    assert differs(stages, given, batch([0], size(name, guidance_scale=6.0)))


@pytest.mark.parametrize("name", GUIDED)
def test_negative_prompts_matter_under_guidance_alone(loaded: Any, name: str) -> None:
    stages = loaded(name)
    none = 0.0 if name == "z-image" else 1.0
    for guidance, matters in ((3.0, True), (none, False)):
        shared = size(name, guidance_scale=guidance)
        pair = batch([0], shared), batch([0], shared, negative_prompt="loud")
        assert differs(stages, *pair) is matters


def test_flux_encodes_no_negative_prompt(loaded: Any) -> None:
    encoded = loaded("flux").encode(batch([0, 1], size("flux", guidance_scale=9.0)))
    assert encoded.negative_index is None
    assert len(encoded.prompts["prompt_embeds"]) == 2


@pytest.mark.parametrize("name", FROM_IMAGES)
def test_image_and_strength_matter(loaded: Any, name: str) -> None:
    stages, images = loaded(name, IMAGE), pictures()["image"]
    shared = from_image(name, 0.6)
    given = batch([0], shared, {"image": images[:1]})
    assert differs(stages, given, batch([0], shared, {"image": images[1:2]}))
    assert differs(stages, given, batch([0], from_image(name, 0.4), {"image": images[:1]}))
    with pytest.raises(ValueError, match="leaves no step"):
        stages.fused(batch([0], from_image(name, 0.1), {"image": images[:1]}))


@pytest.mark.parametrize("name", ["pixart-alpha", "pixart-sigma"])
def test_eta_reaches_the_scheduler(folders: dict[str, Path], name: str) -> None:
    stages = FamilyStages(folders[name], TEXT, scheduler="DDIMScheduler")
    assert differs(stages, batch([0], size(name)), batch([0], size(name, eta=1.0)))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(folders: dict[str, Path], name: str) -> None:
    """No stage hands the next a dtype that it does not take."""
    stages = FamilyStages(folders[name], TEXT, dtype="bfloat16")
    given = batch([0, 1, 2], size(name))
    made = stages.fused(given)
    assert all(made.finite) and made.pixels.std() > 5
    assert np.array_equal(stages.staged(given).pixels, made.pixels)


# --- prompts of different lengths ----------------------------------------------------------------

LONG = "a very long line of words about one red star and one blue circle"


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_lengths_of_other_prompts_do_not_matter(loaded: Any, name: str) -> None:
    """A long prompt beside a short one changes nothing of either, and both are themselves."""
    stages, shared = loaded(name), size(name)
    short, long = batch([0], shared).samples[0], sample(1, shared, prompt=LONG)
    mixed = stages.fused(ConditionBatch((short, long, short), {})).pixels
    assert np.array_equal(mixed[0], stages.fused(ConditionBatch((short,), {})).pixels[0])
    assert np.array_equal(mixed[1], stages.fused(ConditionBatch((long,), {})).pixels[0])
    assert np.array_equal(mixed[0], mixed[2])


def test_z_image_makes_one_call_for_each_length(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the masked attention of mixed lengths rounds alike, so pixels would not show it."""
    stages, shared = loaded("z-image"), size("z-image", num_inference_steps=1)
    transformer, calls = stages.denoise.pipeline.transformer, []
    forward = transformer.forward

    def recorded(latents: Any, time: Any, prompts: Any, **options: Any) -> Any:
        calls.append([-(-len(prompt) // 32) for prompt in prompts])
        return forward(latents, time, prompts, **options)

    monkeypatch.setattr(transformer, "forward", recorded)
    samples = (sample(0, shared), sample(1, shared, prompt=LONG), sample(2, shared))
    stages.fused(ConditionBatch(samples, {}))
    assert calls == [[1, 1, 1, 1, 1, 1], [2, 2, 2, 1, 1, 1]]  # prompts, then negative prompts


def test_qwen_image_always_has_a_mask(loaded: Any) -> None:
    """Else the pipeline would drop it for a batch of the longest prompts alone."""
    for prompt in ("x", "x" * 600):
        encoded = loaded("qwen-image").encode(batch([0], size("qwen-image"), prompt=prompt))
        mask = encoded.prompts["prompt_embeds_mask"]
        assert mask.shape == (2, ONE_LENGTH) and not mask.all(dim=1).any()


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_texts_given_to_the_plain_pipeline(
    folders: dict[str, Path], loaded: Any, name: str
) -> None:
    """It fills prompts up to the longest of the call, on which its rounding depends.

    Measured: 7e-7 in the latents of Qwen-Image, 0 in those of Z-Image; no pixel differs.
    """
    shared = size(name)
    samples = (sample(0, shared), sample(1, shared, prompt=LONG), sample(2, shared))
    given = ConditionBatch(samples, {})
    plain = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    plain.set_progress_bar_config(disable=True)
    latents = plain(
        prompt=[one.prompt for one in samples],
        negative_prompt=["grey"] * 3,
        **{"true_cfg_scale" if name == "qwen-image" else "guidance_scale": 3.0},
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=3,
        generator=generators(given),
        output_type="latent",
    ).images
    ours = loaded(name).denoise(loaded(name).encode(given))
    assert (ours.latents - latents).abs().max() < 5e-6
    theirs = loaded(name).decode(replace(ours, latents=latents))
    assert np.abs(loaded(name).decode(ours).pixels.astype(int) - theirs.pixels).max() <= 1


def test_an_empty_negative_prompt_is_what_the_library_makes_of_none(
    folders: dict[str, Path], loaded: Any
) -> None:
    """But for Qwen-Image, which would not guide without one: there it is a blank."""
    for name, none in {**dict.fromkeys(GUIDED, None), "qwen-image": " "}.items():
        family = family_named(TEXT, name)
        plain = getattr(diffusers, family.pipeline).from_pretrained(folders[name])
        plain.set_progress_bar_config(disable=True)
        given = batch([0, 1, 2], size(name), negative_prompt="")
        negative = {} if none is None else {"negative_prompt": [none] * 3}
        special = {"use_resolution_binning": False, "clean_caption": False}
        scale = "true_cfg_scale" if name == "qwen-image" else "guidance_scale"
        images = plain(
            prompt=[one.prompt for one in given.samples],
            **negative,
            **{scale: 3.0},
            **(special if "pixart" in name or name == "sana" else {}),
            width=given.call.width,
            height=given.call.height,
            num_inference_steps=3,
            generator=generators(given),
        ).images
        ours = loaded(name).fused(given).pixels.astype(int)
        assert np.abs(ours - as_array(images)).max() <= 1, name  # prompts all at once: rounding


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_are_cut_are_recorded(loaded: Any, name: str) -> None:
    """To the token: what is recorded as cut is what changes nothing in the embeddings."""
    encode = loaded(name).encode
    tokenizer, limit = encode.adapter.tokenizers[-1]
    count = limit - len(getattr(encode.pipeline, tokenizer)("x").input_ids) + 1  # letters read

    def made(prompt: str) -> Any:
        return encode(batch([0], size(name, guidance_scale=0.0), prompt=prompt))

    whole, other = made("x" * count), made("x" * (count - 1) + "y")
    assert whole.truncated == (False,)
    assert not torch.equal(whole.prompts["prompt_embeds"], other.prompts["prompt_embeds"])
    one, other = made("x" * count + "y"), made("x" * count + "z")
    assert one.truncated == (True,)
    assert torch.equal(one.prompts["prompt_embeds"], other.prompts["prompt_embeds"])


# --- models that are refused ---------------------------------------------------------------------


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A copy of a family's tiny model, for a test to spoil."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("pixart-alpha", "tokenizer"),
        ("stable-diffusion-3", "text_encoder_2"),
        ("flux", "text_encoder_2"),
        ("sana", "text_encoder"),
        ("qwen-image", "transformer"),
        ("z-image", "vae"),
    ],
)
def test_a_missing_component_is_named(copied: Any, name: str, component: str) -> None:
    folder = copied(name)
    edit(folder / "model_index.json", **{component: [None, None]})
    assert f"{component}: {folder / 'model_index.json'} lists no such component" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "taken", "wanted", "latent"),
    [
        ("stable-diffusion-3", 33, "16", 16),
        ("flux", 128, "64", 16),
        ("qwen-image", 64, "16", 4),
        ("sana", 32, "8", 8),
    ],
)
def test_other_channels_are_refused(
    copied: Any, name: str, taken: int, wanted: str, latent: int
) -> None:
    folder = copied(name)
    edit(folder / "transformer" / "config.json", in_channels=taken)
    message = refusal(folder)
    assert (
        f"transformer takes {taken} channels, but a {name} model for text-to-image takes" in message
    )
    assert f"takes {wanted} (the latents of its vae have {latent})" in message


def test_a_scheduler_of_the_other_kind_is_refused(folders: dict[str, Path]) -> None:
    flow = "FlowMatchEulerDiscreteScheduler"
    message = refusal(folders["flux"], scheduler="DDIMScheduler")
    assert f"DDIMScheduler cannot replace the model's {flow}" in message
    assert f"allowed: {flow}" in message
    assert f"{flow} cannot replace" in refusal(folders["pixart-sigma"], scheduler=flow)


def test_a_pixart_model_serves_its_own_family_alone(folders: dict[str, Path]) -> None:
    message = refusal(folders["pixart-alpha"], IMAGE)
    assert "is a PixArtAlphaPipeline" in message and "it fits text-to-image" in message


def test_facts_of_the_models(folders: dict[str, Path]) -> None:
    facts = {name: inspect(folders[name]) for name in FAMILIES}
    assert {name: (one.width, one.multiple_of) for name, one in facts.items()} == {
        "pixart-alpha": (32, 8),
        "pixart-sigma": (32, 8),
        "stable-diffusion-3": (32, 8),
        "flux": (512, 8),
        "sana": (64, 32),
        "qwen-image": (512, 8),
        "z-image": (512, 8),
    }
    sizes = {name: (one.latent_channels, one.vae_scale_factor) for name, one in facts.items()}
    assert sizes["sana"] == (8, 32) and sizes["qwen-image"] == (4, 4)


def test_the_chat_template_is_part_of_the_model(copied: Any) -> None:
    """It decides the embeddings, so a change of it is another model."""
    folder = copied("z-image")
    before = inspect(folder).manifest_sha256
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert inspect(folder).manifest_sha256 != before
