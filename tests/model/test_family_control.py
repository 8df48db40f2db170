"""Control images and regions: equal to the plain pipelines, effective, and refused if wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families import family_named
from batchgen.models.tiny.control import BUILDERS, build_lone_adapter, build_lone_controlnet
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
    picture,
    pil,
)
from tests.tiny_models import build_model

ROWS = (0, 1, 2)
BOXES = (("star", (0.0, 0.0, 0.5, 0.5)), ("tree", (0.5, 0.25, 1.0, 1.0)))
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A name -> the folder of that tiny model or part, built when it is first asked for."""
    root = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], Path]] = {
        **{name: make for (_, name), make in BUILDERS.items()},
        "plain": build_model,
        "net": build_lone_controlnet,
        "other net": lambda folder: build_lone_controlnet(folder, seed=9),
        "narrow net": lambda folder: build_lone_controlnet(folder, block_out_channels=(16, 32)),
        "xl net": lambda folder: build_lone_controlnet(folder, cross_attention_dim=64),
        "adapter": build_lone_adapter,
        "grey adapter": lambda folder: build_lone_adapter(folder, seed=9, in_channels=1),
        "coarse adapter": lambda folder: build_lone_adapter(folder, xl=True),
    }

    @cache
    def folder(name: str) -> Path:
        return makers[name](root / name)

    return folder


@cache
def _stages(folder: Path, components: tuple[tuple[str, Any], ...] = ()) -> FamilyStages:
    return FamilyStages(folder, "control", components=dict(components))


def rows(parts: int = 1, shift: int = 0, source: bool = False, **settings: Any) -> ConditionBatch:
    """A full micro-batch with that many control images a row."""
    shared = call(**settings)
    names = ["control", "control_1"][:parts] + ["image"] * source
    pictures = {
        name: [picture(10 * number + row + shift, shared.width, shared.height) for row in ROWS]
        for number, name in enumerate(names)
    }
    return batch(ROWS, shared, pictures)


def pixels(stages: FamilyStages, given: ConditionBatch) -> Array:
    return stages.fused(given).pixels.astype(int)


def pictures(given: ConditionBatch, part: str, mode: str = "RGB") -> list[Any]:
    return [pil(image).convert(mode) for image in given.images[part]]


def embeddings(plain: Any, given: ConditionBatch) -> dict[str, torch.Tensor]:
    """Prompts encoded one by one, as arguments of the plain call."""
    guided = given.call.guidance_scale > 1
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if "text_encoder_2" in plain.components:
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    options: dict[str, Any] = {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
        "negative_prompt": "grey" if guided else None,
    }
    encoded = [plain.encode_prompt(one.prompt, **options) for one in given.samples]
    return {
        name: torch.cat([each[place] for each in encoded])
        for place, name in enumerate(names)
        if guided or "negative" not in name
    }


def check(stages: FamilyStages, plain: Any, given: ConditionBatch, **more: Any) -> None:
    """Pixels and latents are those of the plain call with the arguments ``more``, to the bit."""
    arguments = {
        **embeddings(plain, given),
        "guidance_scale": given.call.guidance_scale,
        "num_inference_steps": given.call.num_inference_steps,
        **more,
    }
    images = plain(**arguments, generator=generators(given)).images
    family = family_named("control", stages.info.family)
    check_family(family, stages, given, as_array(images))
    latents = plain(**arguments, generator=generators(given), output_type="latent").images
    assert torch.equal(stages.denoise(stages.encode(given)).latents, latents)


def changed(stages: FamilyStages, given: ConditionBatch, other: ConditionBatch) -> float:
    """Mean difference in levels."""
    return float(np.abs(pixels(stages, given) - pixels(stages, other)).mean())


SINGLE = [
    ("controlnet", "StableDiffusionControlNetPipeline", "controlnet_conditioning_scale"),
    ("controlnet-xl", "StableDiffusionXLControlNetPipeline", "controlnet_conditioning_scale"),
    ("t2i-adapter", "StableDiffusionAdapterPipeline", "adapter_conditioning_scale"),
    ("t2i-adapter-xl", "StableDiffusionXLAdapterPipeline", "adapter_conditioning_scale"),
]


@pytest.mark.parametrize(("name", "pipeline", "scale"), SINGLE)
def test_equals_the_plain_pipeline(folders: Folders, name: str, pipeline: str, scale: str) -> None:
    stages = _stages(folders(name))
    plain = getattr(diffusers, pipeline).from_pretrained(folders(name))
    given = rows(control_scale=(0.7,), eta=0.5)
    check(stages, plain, given, image=pictures(given, "control"), eta=0.5, **{scale: 0.7})
    given = rows(guidance_scale=1.0, width=64)
    check(stages, plain, given, image=pictures(given, "control"))


@pytest.mark.parametrize("name", [name for name, *_ in SINGLE])
def test_every_condition_is_felt(folders: Folders, name: str) -> None:
    stages, given = _stages(folders(name)), rows()
    assert stages.info.controls == 1
    assert changed(stages, given, rows(shift=5)) > 0.5
    assert changed(stages, given, rows(control_scale=(0.3,))) > 0.5
    assert changed(stages, given, rows(control_scale=(1.0,))) == 0
    assert changed(stages, given, rows(guidance_scale=6.0)) > 0.1
    for other in ({"prompt": "a tree"}, {"negative_prompt": "red"}, {"seed": 3}):
        assert changed(stages, given, batch(ROWS, given.call, given.images, **other)) > 0.1


@pytest.mark.parametrize("name", ["controlnet", "controlnet-xl"])
def test_a_source_image_beside_the_control_image(folders: Folders, name: str) -> None:
    stages = _stages(folders(name))
    kind = "StableDiffusionXL" if name.endswith("xl") else "StableDiffusion"
    plain_class = getattr(diffusers, f"{kind}ControlNetImg2ImgPipeline")
    plain = plain_class.from_pretrained(folders(name))
    given = rows(source=True, strength=0.7, control_scale=(0.6,))
    check(
        stages,
        plain,
        given,
        image=pictures(given, "image"),
        control_image=pictures(given, "control"),
        strength=0.7,
        controlnet_conditioning_scale=0.6,
    )
    assert changed(stages, given, rows(source=True, strength=1.0, control_scale=(0.6,))) > 0.5
    other = {**given.images, "image": tuple(picture(90 + row) for row in ROWS)}
    assert changed(stages, given, batch(ROWS, given.call, other)) > 0.5
    with pytest.raises(ValueError, match="leaves no step"):
        stages.fused(rows(source=True, strength=0.1))


@pytest.mark.parametrize("name", ["t2i-adapter", "t2i-adapter-xl", "gligen"])
def test_no_source_image_where_the_pipeline_takes_none(folders: Folders, name: str) -> None:
    given = rows(name != "gligen", source=True, regions=BOXES, num_inference_steps=7)
    with pytest.raises(ValueError, match="takes no source image"):
        _stages(folders(name)).fused(given)


def test_a_plain_model_with_several_controlnets(folders: Folders) -> None:
    nets = (str(folders("net")), str(folders("other net")))
    stages = _stages(folders("plain"), (("controlnet", nets),))
    assert (stages.info.family, stages.info.controls) == ("controlnet", 2)
    plain = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        folders("plain"),
        controlnet=[diffusers.ControlNetModel.from_pretrained(net) for net in nets],
        safety_checker=None,
    )
    given = rows(2, control_scale=(0.4, 0.9))
    both = zip(pictures(given, "control"), pictures(given, "control_1"), strict=True)
    check(
        stages,
        plain,
        given,
        image=[list(pair) for pair in both],  # a list a row: with one ControlNet after the other
        controlnet_conditioning_scale=[0.4, 0.9],
    )
    swapped = {
        "control": given.images["control_1"],
        "control_1": given.images["control"],
    }
    assert changed(stages, given, batch(ROWS, given.call, swapped)) > 0.5
    assert changed(stages, given, rows(2, control_scale=(0.4, 0.2))) > 0.1


def test_several_controlnets_of_a_large_model(folders: Folders) -> None:
    folder, net = folders("controlnet-xl"), folders("controlnet-xl") / "controlnet"
    stages = _stages(folder, (("controlnet", (str(net), str(net))),))
    both = [diffusers.ControlNetModel.from_pretrained(net) for _ in range(2)]
    plain = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        folder, controlnet=diffusers.MultiControlNetModel(both)
    )
    given = rows(2)
    # This pipeline takes no list of PIL images for each ControlNet, so it is given arrays.
    arrays = [np.stack(given.images[part]) / np.float32(255) for part in ("control", "control_1")]
    check(stages, plain, given, image=arrays)


def test_one_controlnet_from_elsewhere(folders: Folders) -> None:
    alone = _stages(folders("plain"), (("controlnet", str(folders("net"))),))
    listed = _stages(folders("plain"), (("controlnet", (str(folders("net")),)),))
    inside = _stages(folders("controlnet"))
    own = _stages(
        folders("controlnet"), (("controlnet", str(folders("controlnet") / "controlnet")),)
    )
    assert np.array_equal(pixels(inside, rows()), pixels(own, rows()))
    assert np.array_equal(pixels(alone, rows()), pixels(listed, rows()))
    assert alone.info.controls == listed.info.controls == 1
    assert alone.info.manifest_sha256 == listed.info.manifest_sha256
    replaced = _stages(folders("controlnet"), (("controlnet", str(folders("other net"))),))
    assert not np.array_equal(pixels(inside, rows()), pixels(replaced, rows()))


def test_adapters_from_elsewhere_one_of_them_for_grey_images(folders: Folders) -> None:
    paths = (str(folders("adapter")), str(folders("grey adapter")))
    stages = _stages(folders("t2i-adapter"), (("adapter", paths),))
    assert stages.info.controls == 2
    plain = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        folders("t2i-adapter"),
        adapter=diffusers.MultiAdapter([diffusers.T2IAdapter.from_pretrained(p) for p in paths]),
    )
    given = rows(2, control_scale=(0.8, 0.5))
    images = [pictures(given, "control"), pictures(given, "control_1", "L")]
    check(stages, plain, given, image=images, adapter_conditioning_scale=[0.8, 0.5])


def test_a_plain_model_with_an_adapter_for_grey_images(folders: Folders, tmp_path: Path) -> None:
    grey = build_lone_adapter(tmp_path / "grey", in_channels=1, xl=True)
    stages = _stages(folders("plain"), (("adapter", str(grey)),))
    plain = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        folders("plain"), adapter=diffusers.T2IAdapter.from_pretrained(grey), safety_checker=None
    )
    given = rows()
    check(stages, plain, given, image=pictures(given, "control", "L"))


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_regions(folders: Folders, guidance: float) -> None:
    stages = _stages(folders("gligen"))
    plain = diffusers.StableDiffusionGLIGENPipeline.from_pretrained(folders("gligen"))
    settings: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": guidance, "eta": 0.5}
    given = batch(ROWS, call(regions=BOXES, **settings))
    check(
        stages,
        plain,
        given,
        gligen_phrases=["star", "tree"],
        gligen_boxes=[[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]],
        eta=0.5,
        width=32,
        height=32,
    )
    assert stages.info.controls == 0
    for regions in (
        BOXES[:1],
        (("star", (0.0, 0.0, 0.5, 0.9)), BOXES[1]),
        (("house", BOXES[0][1]), BOXES[1]),
    ):
        assert changed(stages, given, batch(ROWS, call(regions=regions, **settings))) > 0.1


def test_regions_that_cannot_act(folders: Folders) -> None:
    stages = _stages(folders("gligen"))
    for settings, message in (
        ({}, "0 regions; allowed: 1 to 30"),
        ({"regions": BOXES * 16}, "32 regions; allowed: 1 to 30"),
        ({"regions": (("a" * 30, BOXES[0][1]),)}, "32 tokens; allowed: up to 16"),
        ({"regions": BOXES, "num_inference_steps": 3}, "3 steps are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            stages.fused(batch(ROWS, call(**{"num_inference_steps": 7, **settings})))


@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter-xl"])
def test_images_and_weights_must_be_as_many_as_the_models(folders: Folders, name: str) -> None:
    stages = _stages(folders(name))
    with pytest.raises(
        ValueError, match=r"each needs one control image; got 2 \(control, control_1\)"
    ):
        stages.fused(rows(2))
    with pytest.raises(ValueError, match=r"each needs one control image; got 0 \(none\)"):
        stages.fused(rows(0))
    with pytest.raises(ValueError, match="control_scale has 2 weights for 1 control image"):
        stages.fused(rows(control_scale=(1.0, 0.5)))


REFUSED = [
    ("plain", {}, "controlnet: .* lists no such component; set model.components.controlnet"),
    (
        "plain",
        {"motion": "net"},
        "model.components.motion: a controlnet .*allowed: vae, controlnet",
    ),
    ("controlnet", {"adapter": "adapter"}, "model.components.adapter: a controlnet model"),
    ("plain", {"controlnet": "xl net"}, "cross_attention_dim is 64 there, but 32 in the model"),
    (
        "controlnet-xl",
        {"controlnet": "net"},
        "cross_attention_dim is 32 there, but 64 in the model",
    ),
    (
        "plain",
        {"controlnet": "narrow net"},
        r"block_out_channels is \[16, 32\] there, but \[32, 64\]",
    ),
    ("plain", {"controlnet": "adapter"}, "is a T2IAdapter, not a ControlNetModel"),
    ("plain", {"adapter": "net"}, "is a ControlNetModel, not a T2IAdapter"),
    ("plain", {"adapter": "adapter"}, "downscale_factor is 4 there, but 8 in the model"),
    (
        "t2i-adapter",
        {"adapter": "coarse adapter"},
        "downscale_factor is 8 there, but 4 in the model",
    ),
    ("gligen", {"controlnet": "net"}, "model.components.controlnet: a gligen model"),
]


@pytest.mark.parametrize(("name", "components", "message"), REFUSED)
def test_refused_models(
    folders: Folders, name: str, components: dict[str, str], message: str
) -> None:
    given: dict[str, str | tuple[str, ...]]
    given = {part: str(folders(one)) for part, one in components.items()}
    with pytest.raises(ModelError, match=message):
        models.inspect(Model(path=str(folders(name)), components=given), "control")


def test_a_controlnet_for_another_autoencoder_is_refused(folders: Folders, tmp_path: Path) -> None:
    coarse = build_model(tmp_path / "coarse", factor=8)
    with pytest.raises(ModelError, match="pixels per latent is 4 there, but 8 in the model"):
        models.inspect(
            Model(path=str(coarse), components={"controlnet": str(folders("net"))}), "control"
        )


def test_several_in_the_folder_itself_are_to_be_named(folders: Folders, tmp_path: Path) -> None:
    nets = [diffusers.ControlNetModel.from_pretrained(folders(one)) for one in ("net", "other net")]
    diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        folders("plain"), controlnet=nets, safety_checker=None
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds several.*model.components.controlnet"):
        models.inspect(Model(path=str(tmp_path)), "control")
    named = (str(tmp_path / "controlnet"), str(tmp_path / "controlnet_1"))
    info = models.inspect(Model(path=str(tmp_path), components={"controlnet": named}), "control")
    assert info.controls == 2
    second = _stages(tmp_path, (("controlnet", str(tmp_path / "controlnet_1")),))
    outside = _stages(folders("plain"), (("controlnet", str(folders("other net"))),))
    assert np.array_equal(pixels(second, rows()), pixels(outside, rows()))
