"""LoRAs, textual inversions and schedulers, for a run or for a row, equal plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from batchgen.families import FAMILIES
from batchgen.families.diffusers_source import defaults_of, mixins_of
from batchgen.families.schedulers import SCHEDULERS
from batchgen.models.tiny.stable_diffusion_xl import build_base
from batchgen.models.tiny.transformer import BUILDERS
from batchgen.models.tiny.variation import build_ip_adapter
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from tests.added_files import (
    TEXT,
    build_lora,
    drawn,
    lora_call,
    named,
    pixels,
    plain_pixels,
    token_file,
)
from tests.family_stages import Array, FamilyStages, batch, call, picture
from tests.model_folders import inspect
from tests.tiny_models import build_model

TASK = "text-to-image"
build_flux, build_sd3 = (BUILDERS[TASK, name] for name in ("flux", "stable-diffusion-3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folder_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loras(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the U-Net alone, and of the text encoder too."""
    root = tmp_path_factory.mktemp("loras")
    return {
        "a": build_lora(folder, root / "a", 1),
        "b": build_lora(
            folder, root / "b", 2, ("to_k", "to_out.0", *TEXT), {"r": 3, "lora_alpha": 7}
        ),
    }


SETTINGS: tuple[dict[str, float], ...] = (
    {"a": 1.0},
    {"b": 0.7},
    {"a": -0.5, "b": 1.2},
    {},
)


def test_loras_by_row_equal_the_plain_pipeline(folder: Path, loras: dict[str, Path]) -> None:
    """Alternating in one run; each also equals a run that loads no other."""
    both = FamilyStages(folder, TASK, **named(loras))
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for name, file in loras.items():
        plain.load_lora_weights(str(file), adapter_name=name)
    seen: list[Array] = []
    for setting in (*SETTINGS, *reversed(SETTINGS)):
        plain.disable_lora()
        if setting:
            plain.enable_lora()
            plain.set_adapters(sorted(setting), [setting[name] for name in sorted(setting)])
        made = pixels(both, lora_call(setting))
        assert np.array_equal(made, plain_pixels(plain, lora_call(setting))), setting
        seen.append(made)
    for first, again in zip(seen[:4], reversed(seen[4:]), strict=True):
        assert np.array_equal(first, again)
    assert len({made.tobytes() for made in seen[:4]}) == 4, "each setting gives other pixels"
    for setting, made in zip(SETTINGS, seen, strict=False):
        alone = FamilyStages(folder, TASK, **named({name: loras[name] for name in setting}))
        assert np.array_equal(pixels(alone, lora_call(setting)), made), setting


def test_the_text_encoders_half_is_with_the_encoder(folder: Path, loras: dict[str, Path]) -> None:
    stages = FamilyStages(folder, TASK, **named(loras))
    given = [batch([0], lora_call(setting)) for setting in ({}, {"a": 1.0}, {"b": 1.0})]
    none, first, second = (stages.encode(one).prompts["prompt_embeds"] for one in given)
    assert torch.equal(none, first), "a has no text encoder's half"
    assert not torch.equal(none, second)
    assert stages.denoise.pipeline.text_encoder is None
    assert stages.encode.pipeline.unet is None


def test_loras_of_stable_diffusion_xl(folder_xl: Path, tmp_path: Path) -> None:
    file = build_lora(folder_xl, tmp_path, 3, ("to_q", "to_out.0", *TEXT))
    stages = FamilyStages(folder_xl, TASK, **named({"a": file}))
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder_xl)
    without = plain_pixels(plain, lora_call({}))
    assert np.array_equal(pixels(stages, lora_call({})), without)
    plain.load_lora_weights(str(file), adapter_name="a")
    plain.set_adapters(["a"], [0.8])
    made = pixels(stages, lora_call({"a": 0.8}))
    assert np.array_equal(made, plain_pixels(plain, lora_call({"a": 0.8})))
    assert not np.array_equal(made, without)


def as_kohya(file: Path, to: Path) -> Path:
    """The same LoRA in the form of kohya's scripts, with another alpha."""
    renamed: dict[str, torch.Tensor] = {}
    halves = {"unet": "lora_unet", "text_encoder": "lora_te"}
    for key, tensor in load_file(file).items():
        part, _, rest = key.partition(".")
        for old, new in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            layer, found, end = rest.partition(f".{old}.")
            if found:
                prefix = f"{halves[part]}_{layer.replace('.', '_')}"
                if part == "text_encoder":
                    prefix = prefix.replace("lora_te_", "lora_te_text_model_")
                renamed[f"{prefix}.{new}.{end}"] = tensor
                renamed[f"{prefix}.alpha"] = torch.tensor(1.5)
    save_file(renamed, to)
    return to


def test_loras_in_the_form_of_other_scripts(
    folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    file = as_kohya(loras["b"], tmp_path / "kohya.safetensors")
    stages = FamilyStages(folder, TASK, **named({"k": file}))
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    plain.load_lora_weights(str(file), adapter_name="k")
    plain.set_adapters(["k"], [1.0])
    made = pixels(stages, lora_call({"k": 1.0}))
    assert np.array_equal(made, plain_pixels(plain, lora_call({"k": 1.0})))
    assert not np.array_equal(made, pixels(stages, lora_call({})))


def test_a_lora_is_at_rest(folder: Path, tmp_path: Path) -> None:
    """Its dropout, which plain diffusers leaves at work, does not make images differ."""
    dropout = {"r": 2, "lora_dropout": 0.5}
    file = build_lora(folder, tmp_path, 1, ("to_q", *TEXT), dropout)
    stages = FamilyStages(folder, TASK, **named({"a": file}))
    first, again = (pixels(stages, lora_call({"a": 1.0})) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(build_sd3, ("to_q", "to_v", *TEXT)), (build_flux, ("to_q", "to_v"))],
    ids=["stable-diffusion-3", "flux"],
)
def test_loras_of_transformers(build: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    file = build_lora(model, tmp_path / "lora", 1, targets)
    stages = FamilyStages(model, TASK, **named({"a": file}))
    plain = diffusers.DiffusionPipeline.from_pretrained(model)
    plain.set_progress_bar_config(disable=True)
    settings: tuple[dict[str, float], ...] = ({}, {"a": 0.5}, {"a": 2.0})
    seen = []
    for setting in settings:
        if setting:
            plain.load_lora_weights(str(file), adapter_name="a")
            plain.set_adapters(["a"], [setting["a"]])
        seen.append(pixels(stages, lora_call(setting)))
        assert np.array_equal(seen[-1], plain_pixels(plain, call())), setting
        plain.unload_lora_weights()
    assert len({made.tobytes() for made in seen}) == 3
    assert np.array_equal(pixels(stages, lora_call({})), seen[0])


def test_loras_beside_an_ip_adapter(tmp_path: Path) -> None:
    """Both change the attention layers of one U-Net."""
    model = build_ip_adapter(tmp_path / "model")
    file = build_lora(model, tmp_path / "lora", 1, ("to_k", *TEXT))
    adapter = {"path": str(model / "ip_adapter")}
    stages = FamilyStages(model, "variation", ip_adapter=adapter, **named({"a": file}))
    alone = FamilyStages(model, "variation", ip_adapter=adapter)
    images = {"image": [picture(0), picture(0), picture(0)]}
    plain = diffusers.StableDiffusionPipeline.from_pretrained(model)
    plain.load_lora_weights(str(file), adapter_name="a")
    plain.load_ip_adapter(adapter["path"], subfolder="", weight_name="ip-adapter_sd15.safetensors")
    plain.set_adapters(["a"], [0.6])
    shared = lora_call({"a": 0.6})
    made = stages.fused(batch([0, 1, 2], shared, images)).pixels
    image = Image.fromarray(images["image"][0])
    assert np.array_equal(made, plain_pixels(plain, shared, ip_adapter_image=image))
    without = stages.fused(batch([0, 1, 2], lora_call({}), images)).pixels
    assert np.array_equal(without, alone.fused(batch([0, 1, 2], call(), images)).pixels)
    assert not np.array_equal(without, made)


def test_learned_tokens(folder: Path, tmp_path: Path) -> None:
    """Of one vector, named by the file; and of three, named by the spec."""
    one = token_file(tmp_path / "one", {"<cat>": drawn(32)})
    three = token_file(tmp_path / "three", {"emb_params": drawn(3, 32)})
    fields = [{"path": str(one.parent)}, {"path": str(three), "token": "<dog>"}]
    stages = FamilyStages(folder, TASK, textual_inversions=fields)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    plain.load_textual_inversion(str(one))
    plain.load_textual_inversion(str(three), token="<dog>")
    for prompt in ("a <cat>", "<dog> and <cat>"):
        encoded = stages.encode(batch([0], call(), prompt=prompt))
        wanted, _ = plain.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(encoded.prompts["prompt_embeds"][:1], wanted), prompt
        assert encoded.truncated == (False,), prompt
    unlearned = FamilyStages(folder, TASK).encode(batch([0], call(), prompt="a <cat>"))
    assert unlearned.prompts["prompt_embeds"].shape == wanted[[0, 0]].shape
    long = stages.encode(batch([0], call(), prompt="<dog> " * 5))
    assert long.truncated == (True,), "each stands for three tokens: 15, a start and an end"


def test_learned_tokens_of_two_text_encoders(folder_xl: Path, tmp_path: Path) -> None:
    vectors = {"clip_l": drawn(2, 32), "clip_g": drawn(2, 32) + 1}
    file = token_file(tmp_path, vectors)
    fields = [{"path": str(file), "token": "<s>"}]
    stages = FamilyStages(folder_xl, TASK, textual_inversions=fields)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder_xl)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        plain.load_textual_inversion(
            vectors[key],
            token="<s>",
            text_encoder=getattr(plain, f"text_encoder{end}"),
            tokenizer=getattr(plain, f"tokenizer{end}"),
        )
    encoded = stages.encode(batch([0], call(), prompt="a <s>"))
    wanted, _, pooled, _ = plain.encode_prompt("a <s>", do_classifier_free_guidance=False)
    assert torch.equal(encoded.prompts["prompt_embeds"][:1], wanted)
    assert torch.equal(encoded.prompts["pooled_prompt_embeds"][:1], pooled)


def test_schedulers_by_row_equal_runs_with_them(folder: Path) -> None:
    """Alternating in one run; each as a run with that scheduler, and as plain diffusers."""
    names = ("EulerDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler", None)
    options = {"timestep_spacing": "trailing", "use_karras_sigmas": True}
    stages = FamilyStages(
        folder, TASK, scheduler="DPMSolverMultistepScheduler", scheduler_options=options
    )
    seen = {}
    for name in names:
        made = pixels(stages, call(scheduler=name))
        known = defaults_of(name) if name else options
        own = FamilyStages(
            folder,
            TASK,
            scheduler=name or "DPMSolverMultistepScheduler",
            scheduler_options={key: one for key, one in options.items() if key in known},
        )
        assert np.array_equal(made, pixels(own, call())), name
        plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        plain.scheduler = getattr(diffusers, name or "DPMSolverMultistepScheduler").from_config(
            plain.scheduler.config, **{key: one for key, one in options.items() if key in known}
        )
        assert np.array_equal(made, plain_pixels(plain, call())), name
        seen[name] = made.tobytes()
    assert len(set(seen.values())) == 3


def test_options_of_the_models_own_scheduler(folder: Path) -> None:
    stages = FamilyStages(folder, TASK, scheduler_options={"timestep_spacing": "trailing"})
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    before = plain_pixels(plain, call())
    plain.scheduler = diffusers.PNDMScheduler.from_config(
        plain.scheduler.config, timestep_spacing="trailing"
    )
    made = pixels(stages, call())
    assert np.array_equal(made, plain_pixels(plain, call()))
    assert not np.array_equal(made, before)


def test_what_the_source_says_is_so() -> None:
    """Options and mixins are read from the text of the library; here it is imported."""
    for name in SCHEDULERS:
        made = getattr(diffusers, name)
        config = {key: one for key, one in made().config.items() if not key.startswith("_")}
        known = defaults_of(name)
        assert known.keys() == config.keys(), name
        simple = {key: one for key, one in known.items() if isinstance(one, bool | int | str)}
        assert simple == {key: config[key] for key in simple}, name
    for name in {family.pipeline for family in FAMILIES}:
        loads = hasattr(getattr(diffusers, name), "load_lora_weights")
        assert loads == any(one.endswith("LoraLoaderMixin") for one in mixins_of(name)), name


def test_added_files_are_part_of_the_model(folder: Path, loras: dict[str, Path]) -> None:
    hashes = [inspect(folder, **fields).manifest_sha256 for fields in ({}, named(loras))]
    only = inspect(folder, **named({"a": loras["a"]})).manifest_sha256
    other = inspect(folder, **named({"a": loras["b"]})).manifest_sha256
    assert len({*hashes, only, other}) == 4


def test_additions_change_the_fingerprint() -> None:
    base = {"input": {"path": "x"}, "output": {"url": "y"}}
    changes: list[dict[str, Any]] = [
        {},
        {"model.loras": [{"name": "a", "path": "x"}]},
        {"model.loras": [{"name": "a", "path": "x", "weight": 0.5}]},
        {"model.textual_inversions": [{"path": "x"}]},
        {"model.scheduler_options": {"use_karras_sigmas": True}},
        {"model.ip_adapter": {"path": "x"}},
    ]
    made = {build(merge(base, one)).fingerprint for one in changes}
    assert len(made) == len(changes)
