"""Prompt weighting: equal to a plain call with compel's embeddings, or refused."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.families import FAMILIES, family_named
from batchgen.models import weighting
from batchgen.models.tiny import BUILDERS
from batchgen.records import Call, ConditionBatch
from batchgen.shard.prepare import prepare
from batchgen.spec.model import Model
from batchgen.stages.encode import Encoder
from tests.added_files import build_lora, drawn, lora_call, named, token_file
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
from tests.model_folders import refusal, run_python
from tests.unit.test_prepare import settled, shard_of

compel = pytest.importorskip("compel")

TASK = "text-to-image"
SD, XL = "stable-diffusion", "stable-diffusion-xl"
WEIGHTED = ("(red)1.5 star", "a blue- (circle)0.3", '("a star","seven").blend(0.7,0.3)')
TOKENS = 16  # that the tiny text encoders read


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: BUILDERS[TASK, name](root / name) for name in (SD, XL)}


@pytest.fixture(scope="module")
def stages(folders: dict[str, Path]) -> dict[str, FamilyStages]:
    return {
        name: FamilyStages(folder, TASK, prompt_weighting="compel")
        for name, folder in folders.items()
    }


def prompts(shared: Call, **images: list[Array]) -> ConditionBatch:
    """Three rows, each with weights of its own, also in its negative prompt."""
    given = batch([0, 1, 2], shared, images)
    samples = [
        replace(one, prompt=prompt, negative_prompt="(grey)++ x")
        for one, prompt in zip(given.samples, WEIGHTED, strict=True)
    ]
    return ConditionBatch(tuple(samples), given.images)


def plain(folder: Path, given: ConditionBatch, name: str | None = None, **more: Any) -> Array:
    """The plain pipeline with the embeddings of compel's own wrapper for it."""
    pipeline = getattr(diffusers, name or "DiffusionPipeline").from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    xl = hasattr(pipeline, "text_encoder_2")
    wrapper = (compel.CompelForSDXL if xl else compel.CompelForSD)(pipeline)
    each = [wrapper(one.prompt, negative_prompt=one.negative_prompt) for one in given.samples]
    names = {"prompt_embeds": "embeds", "negative_prompt_embeds": "negative_embeds"}
    if xl:
        names |= {"pooled_prompt_embeds": "pooled_embeds"}
        names |= {"negative_pooled_prompt_embeds": "negative_pooled_embeds"}
    images = pipeline(
        **{to: torch.cat([getattr(one, of) for one in each]) for to, of in names.items()},
        num_inference_steps=given.call.num_inference_steps,
        guidance_scale=given.call.guidance_scale,
        generator=generators(given),
        **more,
    ).images
    return as_array(images)


def embeds(encoder: Encoder, prompt: str, **settings: Any) -> torch.Tensor:
    """(1, T, D) of one prompt."""
    return encoder(batch([0], call(**settings), prompt=prompt)).prompts["prompt_embeds"][:1]


@pytest.mark.parametrize("name", [SD, XL])
def test_as_the_plain_call(
    folders: dict[str, Path], stages: dict[str, FamilyStages], name: str
) -> None:
    given = prompts(call())
    wanted = plain(folders[name], given, height=32, width=32)
    check_family(family_named(TASK, name), stages[name], given, wanted)
    unread = FamilyStages(folders[name], TASK)
    assert not np.array_equal(unread.fused(given).pixels, wanted)


def test_from_an_image(folders: dict[str, Path]) -> None:
    task, images = "image-to-image", [picture(number) for number in range(3)]
    made = FamilyStages(folders[SD], task, prompt_weighting="compel")
    given = prompts(call(strength=0.7), image=images)
    name = "StableDiffusionImg2ImgPipeline"
    wanted = plain(folders[SD], given, name, image=[pil(one) for one in images], strength=0.7)
    check_family(family_named(task, SD), made, given, wanted)


@pytest.mark.parametrize("name", [SD, XL])
def test_weights_matter(
    folders: dict[str, Path], stages: dict[str, FamilyStages], name: str
) -> None:
    encoder, unread = stages[name].encode, FamilyStages(folders[name], TASK).encode
    read = ("red star", "(red)1.5 star", "(red)0.5 star", "red star++")
    seen = [embeds(encoder, prompt) for prompt in read]
    for number, one in enumerate(seen):
        assert one.shape == seen[0].shape
        assert not any(torch.equal(one, other) for other in seen[:number]), read[number]
    assert torch.equal(seen[0], embeds(unread, "red star")), "no weights, no difference"
    assert torch.equal(embeds(encoder, "(red) star"), seen[0])
    literal = embeds(unread, "(red) star")
    assert not torch.equal(literal, seen[0]), "parentheses are text without the option"
    assert torch.equal(embeds(encoder, r"\(red\) star"), literal)


def test_one_shape_and_what_is_truncated(stages: dict[str, FamilyStages]) -> None:
    for name, made in stages.items():
        width = made.encode(batch([0], call())).prompts["prompt_embeds"].shape[2]
        for prompt in ("", "(red)1.5 " * 20, "x " * 40, '("a","b").blend(1,2)'):
            encoded = made.encode(batch([0, 1], call(), prompt=prompt))
            shape = encoded.prompts["prompt_embeds"].shape
            assert shape == (2, TOKENS, width), (name, prompt)
            assert encoded.truncated == (len(prompt) > 40,) * 2, (name, prompt)
    marked = "((((((((red))))))))1.1"  # more marks than tokens that are read
    tokenizer = stages[SD].encode.pipeline.tokenizer
    assert len(tokenizer(marked).input_ids) > TOKENS
    assert stages[SD].encode(batch([0], call(), prompt=marked)).truncated == (False,)


def test_an_empty_negative_prompt_of_xl_is_nothing(stages: dict[str, FamilyStages]) -> None:
    encoded = stages[XL].encode(batch([0], call(), negative_prompt=""))
    assert encoded.negative_index == (1,)
    for tensor in encoded.prompts.values():
        assert not tensor[1].any() and tensor[0].any()


def test_loras_by_row(folders: dict[str, Path], tmp_path: Path) -> None:
    """Compel caches the empty prompt's embeddings, which differ with a LoRA."""
    file = build_lora(folders[SD], tmp_path, 1, ("q_proj", "v_proj", "fc1"))
    field = {"prompt_weighting": "compel", **named({"a": file})}
    prompt, lora = "(red)1.5 star", lora_call({"a": 1.0}).lora
    one, other = (FamilyStages(folders[SD], TASK, **field).encode for _ in range(2))
    with_first = embeds(one, prompt, lora=lora), embeds(one, prompt, lora=())
    without_first = embeds(other, prompt, lora=()), embeds(other, prompt, lora=lora)
    assert torch.equal(with_first[0], without_first[1])
    assert torch.equal(with_first[1], without_first[0])
    assert not torch.equal(*with_first)


def test_learned_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    file = token_file(tmp_path, {"emb_params": drawn(3, 32)})
    field: dict[str, Any] = {"textual_inversions": [{"path": str(file), "token": "<dog>"}]}
    encoder = FamilyStages(folders[SD], TASK, prompt_weighting="compel", **field).encode
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders[SD])
    pipeline.load_textual_inversion(str(file), token="<dog>")
    manager = compel.DiffusersTextualInversionManager(pipeline)
    wrapper = compel.CompelForSD(pipeline, textual_inversion_manager=manager)
    prompt = "a (<dog>)1.3"
    found = embeds(encoder, prompt)
    assert torch.equal(found, wrapper(prompt).embeds)
    assert not torch.equal(found, embeds(encoder, "a <dog>"))
    assert torch.equal(
        embeds(encoder, "a <dog>"), pipeline.encode_prompt("a <dog>", "cpu", 1, False)[0]
    )


def test_nested_parentheses_take_no_time() -> None:
    """Without memoization compel's parser takes ten times as long for each further pair."""
    start = time.process_time()
    for depth in range(1, 30):
        models.check_prompt("(" * depth + "red" + ")" * depth)
        models.check_prompt("(" * depth + "red")
    assert time.process_time() - start < 10


REFUSED = [
    ('("a","b").and()', "without .and()"),
    ("a cat.swap(dog)", "without .swap()"),
    ("a star withLora(ink,1)", "without withLora()"),
    ("withLora(ink,1)", "without .and()"),
    ('("a","b").blend(x)', "a prompt that compel can read; it says: could not convert"),
    ('("a","b").blend(1)', "a prompt that compel can read; it says: while parsing Blend"),
    ("(" * 300, "a prompt that compel can read"),
    ('red ""-- star', "a prompt in which every weight has words"),
]


@pytest.mark.parametrize(("prompt", "told"), REFUSED)
def test_prompts_that_are_refused(prompt: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        models.check_prompt(prompt)


def test_a_bad_prompt_rejects_its_row_alone() -> None:
    bad = '("a","b").and()'
    columns = {"prompt": ["(red)1.5 star", bad, "b"], "negative_prompt": ["", None, bad]}
    plan = settled(("negative_prompt",), model__prompt_weighting="compel")
    made = prepare(shard_of(columns), plan)
    assert [sample.prompt for sample in made.samples] == ["(red)1.5 star"]
    assert [one.reason for one in made.dropped] == ["bad-prompt", "bad-negative_prompt"]
    assert made.dropped[0].message.startswith(
        f"prompt is {bad!r}; allowed: a prompt without .and()"
    )
    unread = prepare(shard_of(columns), settled(("negative_prompt",)))
    assert len(unread.samples) == 3, "without the option these are words as any"


def test_compel_takes_no_settings_of_the_prompt() -> None:
    plain = next(one for one in FAMILIES if (one.task, one.name) == (TASK, SD))
    adapter = replace(plain.adapter, prompt_settings=("clip_skip",))
    family = replace(plain, settings=("eta", "clip_skip"), adapter=adapter)
    assert weighting.settings_of(family, Model()) == ("eta", "clip_skip")
    assert weighting.weighted(adapter, Model()) is adapter
    weights = Model(prompt_weighting="compel")
    assert weighting.settings_of(family, weights) == ("eta",)
    assert weighting.weighted(adapter, weights).prompt_settings == ()


def test_the_families_that_take_weights(tmp_path: Path) -> None:
    takes = {
        (one.task, one.name) for one in FAMILIES if one.adapter.encode_prompt in weighting._ENCODERS
    }
    assert {one.name for one in FAMILIES if one.task == TASK and (TASK, one.name) in takes} == {
        *(SD, XL, "latent-consistency")
    }
    assert {"control", "inpainting", "image-to-image"} <= {task for task, _ in takes}
    for task, name in ((TASK, "flux"), ("class-conditional", "dit")):
        folder = BUILDERS[task, name](tmp_path / name)
        told = refusal(folder, task, prompt_weighting="compel")
        assert told.startswith(
            f"model.prompt_weighting: a {name} model for {task} does not support"
        )


def test_compel_that_is_missing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighting, "find_spec", lambda name: None)
    told = refusal(folders[SD], prompt_weighting="compel")
    assert (
        told
        == "model.prompt_weighting: the package compel is not installed; run `pip install compel`"
    )


def test_planning_loads_no_compel(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from batchgen import models; from batchgen.spec.model import Model\n"
        f"model = Model(path={str(folders[SD])!r}, prompt_weighting='compel')\n"
        "models.inspect(model, 'text-to-image')\n"
        "assert not {'torch', 'compel', 'pyparsing'} & set(sys.modules)\n"
    )
    done = run_python(code, {})
    assert done.returncode == 0, done.stderr
