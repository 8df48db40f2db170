"""LoRAs, learned tokens and schedulers, by run and by row: equal to plain diffusers, or refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen import spec
from batchgen.errors import ModelError, SpecError
from batchgen.families import FAMILIES
from batchgen.records import Call
from batchgen.replicas.schedulers import SCHEDULERS
from batchgen.replicas.sources import defaults_of, mixins_of
from batchgen.replicas.tiny.parts import seeded
from batchgen.replicas.tiny.stable_diffusion_xl import build_base
from batchgen.replicas.tiny.transformer import BUILDERS
from batchgen.replicas.tiny.variation import build_image_variation
from batchgen.tasks import parse_lora
from tests.family_stages import Array, FamilyStages, as_array, batch, call, generators
from tests.model_folders import inspect as inspected
from tests.model_folders import refusal
from tests.tiny_models import build_model

TASK = "text-to-image"
build_flux, build_sd3 = (BUILDERS[TASK, name] for name in ("flux", "stable-diffusion-3"))
TEXT = ("q_proj", "v_proj", "fc1")
PROMPTS = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folder_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("models") / "tiny")


def build_lora(
    model: Path,
    folder: Path,
    seed: int,
    targets: tuple[str, ...] = ("to_q", "to_v"),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A LoRA of the denoiser and, where its targets name any, of the text encoders' layers.

    ``config``: of peft, kept in the file; without one the file has weights alone.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    saved: dict[str, Any] = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        chosen = [one for one in targets if (one in TEXT) == name.startswith("text")]
        module = getattr(pipeline, name, None)
        if module is None or not chosen:
            continue
        module.add_adapter(peft.LoraConfig(target_modules=chosen, **(config or {"r": 2})))
        found = peft.utils.get_peft_model_state_dict(module)
        with seeded(seed):  # large enough to tell
            layers = {key: 0.2 * torch.randn(one.shape) for key, one in found.items()}
        saved[f"{name}_lora_layers"] = layers
        if config is not None:
            saved[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, **saved)
    return folder / "pytorch_lora_weights.safetensors"


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


def named(files: Mapping[str, Path], **weights: float) -> dict[str, Any]:
    """The model's field ``loras``."""
    rows = [{"name": name, "path": str(path)} for name, path in files.items()]
    return {"loras": [row | {"weight": weights.get(row["name"], 1.0)} for row in rows]}


@torch.no_grad()
def plain_pixels(pipeline: Any, shared: Call) -> Array:
    """What the plain pipeline makes of three rows, prompts encoded one by one."""
    given = batch([0, 1, 2], shared)
    names = PROMPTS + (POOLED if hasattr(pipeline, "text_encoder_2") else ())
    if isinstance(pipeline, diffusers.FluxPipeline):
        names = ("prompt_embeds", "pooled_prompt_embeds")
    taken = inspect.signature(pipeline.encode_prompt).parameters
    each = []
    for one in given.samples:
        arguments = {
            "prompt": one.prompt,
            "prompt_2": None,
            "prompt_3": None,
            "device": "cpu",
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "negative_prompt": one.negative_prompt,
        }
        known = {name: value for name, value in arguments.items() if name in taken}
        each.append(pipeline.encode_prompt(**known))
    images = pipeline(
        **{name: torch.cat([one[place] for one in each]) for place, name in enumerate(names)},
        height=32,
        width=32,
        num_inference_steps=shared.num_inference_steps,
        guidance_scale=shared.guidance_scale,
        generator=generators(given),
    ).images
    return as_array(images)


def pixels(stages: FamilyStages, shared: Call) -> Array:
    made: Array = stages.fused(batch([0, 1, 2], shared)).pixels
    return made


SETTINGS: tuple[dict[str, float], ...] = (
    {"a": 1.0},
    {"b": 0.7},
    {"a": -0.5, "b": 1.2},
    {},
)


def lora_call(setting: Mapping[str, float]) -> Call:
    return call(lora=tuple(sorted(setting.items())))


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


def token_file(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "learned_embeds.safetensors"
    save_file(dict(tensors), file)
    return file


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_karas_sigmas": True}, "did you mean 'use_karras_sigmas'?"),
        ({"steps_offset": "many"}, "got 'many'; allowed: a value like 0"),
        ({"steps_offset": True}, "got True; allowed: a value like 0"),
        ({"use_karras_sigmas": 1}, "got 1; allowed: a value like False"),
        ({"prediction_type": "noise"}, "allowed: epsilon, sample, v_prediction"),
        ({"timestep_spacing": "traling"}, "allowed: linspace, leading, trailing"),
    ],
)
def test_options_that_a_scheduler_does_not_take(
    folder: Path, options: dict[str, Any], told: str
) -> None:
    given = {"scheduler": "EulerDiscreteScheduler", "scheduler_options": options}
    message = refusal(folder, **given)
    assert f"model.scheduler_options.{next(iter(options))}" in message
    assert told in message


def test_noise_of_its_own_is_refused(tmp_path: Path) -> None:
    message = refusal(build_flux(tmp_path), scheduler_options={"stochastic_sampling": True})
    assert "a sample's seed does not fix its image" in message


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
    hashes = [inspected(folder, **fields).manifest_sha256 for fields in ({}, named(loras))]
    only = inspected(folder, **named({"a": loras["a"]})).manifest_sha256
    other = inspected(folder, **named({"a": loras["b"]})).manifest_sha256
    assert len({*hashes, only, other}) == 4


def test_added_files_that_cannot_be_used(
    folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    def told(file: Path, **fields: Any) -> str:
        return refusal(folder, loras=[{"name": "a", "path": str(file), **fields}])

    assert "model.loras.0" in told(tmp_path / "none.safetensors")
    assert "no such file or folder" in told(tmp_path / "none.safetensors")
    assert "has no safetensors file" in told(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"pickled")
    assert "lora.bin cannot be used: allowed is safetensors alone" in told(tmp_path)
    assert "allowed is safetensors alone" in told(tmp_path / "lora.bin")
    assert "allowed is safetensors alone" in told(tmp_path, weight_name="lora.bin")
    (tmp_path / "x.safetensors").write_bytes(b"not what it says it is")
    assert "is not a safetensors file" in told(tmp_path / "x.safetensors")
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "is no LoRA: it holds unet.conv.weight" in told(tmp_path)
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "y.safetensors")
    assert "name one by weight_name: x.safetensors, y.safetensors" in told(tmp_path)
    assert "is missing" in told(tmp_path, weight_name="z.safetensors")
    assert "has no revisions" in told(loras["a"], revision="main")


def test_learned_tokens_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    def told(tensors: Mapping[str, torch.Tensor], **fields: Any) -> str:
        row = {"path": str(token_file(tmp_path, tensors)), **fields}
        return refusal(folder, textual_inversions=[row])

    wide = told({"<cat>": torch.zeros(2, 48)})
    assert "shape (2, 48), those of text_encoder are 32 wide" in wide
    assert "is no learned token: it holds a, b" in told({"a": torch.zeros(1), "b": torch.zeros(1)})
    assert "give one by model.textual_inversions.0.token" in told({"emb_params": torch.zeros(32)})
    two = {"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}
    assert "is for the text_encoder_2, which the model has not" in told(two, token="<s>")


def test_a_token_that_is_there_already(folder: Path, tmp_path: Path) -> None:
    file = token_file(tmp_path, {"a": torch.zeros(32)})
    with pytest.raises(ModelError, match="Token a already in tokenizer vocabulary"):
        FamilyStages(folder, TASK, textual_inversions=[{"path": str(file)}])


def test_a_lora_of_another_model(folder: Path, folder_xl: Path, tmp_path: Path) -> None:
    flux = build_lora(build_flux(tmp_path / "flux"), tmp_path / "lora", 1)
    with pytest.raises(ModelError, match=r"model\.loras\.0: .*made for another model"):
        FamilyStages(folder, TASK, **named({"a": flux}))
    wider = build_lora(folder_xl, tmp_path / "wider", 1, ("to_k",))
    with pytest.raises(
        ModelError, match=r"model\.loras\.0: .* cannot be used: .*size mismatch for"
    ):
        FamilyStages(folder, TASK, **named({"a": wider}))


def test_models_that_take_no_lora(loras: dict[str, Path], tmp_path: Path) -> None:
    model = build_image_variation(tmp_path)
    told = refusal(model, "variation", **named(loras))
    assert "(StableDiffusionImageVariationPipeline) takes no LoRA" in told


def test_the_text_of_a_row() -> None:
    known = {"style": 0.8, "face": 1.0}
    assert parse_lora("", known) == parse_lora("  ", known) == ()
    assert parse_lora("style, face : -0.5", known) == (("face", -0.5), ("style", 0.8))
    for text, told in (
        ("stile", "names of model.loras (face, style; did you mean 'style'?); got 'stile'"),
        ("style,", "got ''"),
        ("style,style:1", "style stands there twice"),
        ("style:much", "with a weight of -10 to 10; got 'style:much'"),
        ("style:nan", "with a weight of -10 to 10"),
        ("style:11", "with a weight of -10 to 10"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            parse_lora(text, known)


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"model.loras": [{"name": "a", "path": "x"}] * 2}, "model", "stands there twice"),
        ({"model.loras": [{"name": "a.b", "path": "x"}]}, "model.loras.0.name", "A-Z"),
        ({"model.loras": [{"name": "a", "pth": "x"}]}, "model.loras.0.path", "required"),
        ({"sampling.lora": "a"}, "sampling.lora", "names of model.loras (none)"),
        ({"input.columns.lora": "l"}, "input.columns.lora", "null, where model.loras names none"),
        ({"model.ip_adapter": {"paht": "x"}}, "model.ip_adapter.path", "required"),
        (
            {"model.ip_adapter": {"path": "x", "scale": 1}},
            "model.ip_adapter.scale",
            "path, weight_name, revision, subfolder, image_encoder",
        ),
        (
            {"model.loras": [{"name": "a", "path": "s3://me:secret@host/x"}]},
            "model.loras.0.path",
            "without credentials",
        ),
    ],
)
def test_specs_that_are_refused(fields: dict[str, Any], field: str, told: str) -> None:
    base = {"input": {"path": "x"}, "output": {"url": "y"}}
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        spec.build(spec.merge(base, fields))
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


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
    made = {spec.build(spec.merge(base, one)).fingerprint for one in changes}
    assert len(made) == len(changes)
