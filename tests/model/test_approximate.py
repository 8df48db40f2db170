"""Approximate modes: what they compute, and that they keep the promises of exact sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from batchgen.errors import ModelError
from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.records import Call, ConditionBatch
from tests.family_specs import model_fields
from tests.family_stages import FamilyStages, batch, call, generators
from tests.model.test_no_sync import Loop, rows_for

STEPS = 8
FEW = (
    ("text-to-image", "stable-diffusion"),
    ("image-to-image", "stable-diffusion-xl"),
    ("text-to-image", "stable-diffusion-3"),
    ("text-to-image", "flux"),
    ("text-to-image", "qwen-image"),
)
RATIOS = [1.0, 0.99, 1.0, 0.985, 1.0, 0.99, 1.0, 0.98]
# With these, each mode leaves out some of eight steps.
MODES: dict[str, Any] = {
    "guidance_interval": [0.25, 0.75],
    "deep_cache": {"cache_interval": 3},
    "mag_cache": {"mag_ratios": RATIOS},
    "taylor_seer": {"cache_interval": 2, "disable_cache_before_step": 2},
}


def families_with(mode: str) -> list[Family]:
    return [family for family in FAMILIES if mode in family.approximations]


def id_of(family: Family) -> str:
    return f"{family.task}-{family.name}"


def of(task: str, name: str) -> Family:
    return next(one for one in FAMILIES if (one.task, one.name) == (task, name))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Id of a family -> the folder of its tiny model, built when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    class Built(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            family = next(one for one in FAMILIES if id_of(one) == name)
            self[name] = BUILDERS[family.task, family.name](root / name)
            return self[name]

    return Built()


def stages_of(built: dict[str, Path], family: Family, **approximate: Any) -> FamilyStages:
    fields = model_fields(family, built[id_of(family)])
    folder = Path(fields.pop("path"))
    sampling = {"approximate": approximate}
    return FamilyStages(folder, family.task, batch_size=2, sampling=sampling, **fields)


def given(family: Family, **settings: Any) -> ConditionBatch:
    """Two rows of eight steps."""
    rows = rows_for(family.task, family.name)
    return with_call(rows, num_inference_steps=STEPS, **settings)


def with_call(rows: ConditionBatch, **settings: Any) -> ConditionBatch:
    shared: Call = replace(rows.samples[0].call, **settings)
    return replace(rows, samples=tuple(replace(one, call=shared) for one in rows.samples))


def latents(stages: FamilyStages, rows: ConditionBatch) -> torch.Tensor:
    made: torch.Tensor = stages.denoise(stages.encode(rows)).latents
    return made


def only(rows: ConditionBatch, place: int) -> ConditionBatch:
    """One of the rows, so that it has another neighbour, which is padding, and another place."""
    images = {part: each[place : place + 1] for part, each in rows.images.items()}
    return replace(rows, samples=rows.samples[place : place + 1], images=images)


@contextmanager
def counted(*modules: torch.nn.Module) -> Iterator[list[int]]:
    """The size of the batch of every call of the modules."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        sizes.append(next(one.shape[0] for one in tensors if one.dim()))

    handles = [one.register_forward_pre_hook(note, with_kwargs=True) for one in modules]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def keeps_the_promises(stages: FamilyStages, rows: ConditionBatch, exact: torch.Tensor) -> None:
    """Not the exact latents; but the same again, at another place, alone, and with other steps."""
    made = latents(stages, rows)
    assert torch.isfinite(made).all()
    assert not torch.equal(made, exact), "nothing was approximated"
    latents(stages, with_call(rows, num_inference_steps=STEPS - 1))
    assert torch.equal(latents(stages, rows), made), "the call before left something"
    assert torch.equal(latents(stages, only(rows, 1))[0], made[1]), "another place and neighbour"
    assert np.array_equal(stages.staged(rows).pixels, stages.fused(rows).pixels)


@pytest.mark.parametrize(("task", "name"), FEW)
def test_modes_keep_the_promises(built: dict[str, Path], task: str, name: str) -> None:
    """Of a few families; `tests/system/test_approximate_families.py` has the others."""
    every_mode_keeps_the_promises(built, of(task, name))


def every_mode_keeps_the_promises(built: dict[str, Path], family: Family) -> None:
    rows = given(family)
    exact = latents(stages_of(built, family), rows)
    for mode, options in MODES.items():
        if mode in family.approximations:
            keeps_the_promises(stages_of(built, family, **{mode: options}), rows, exact)
    if {"guidance_interval", "deep_cache"} <= set(family.approximations):
        both = {name: MODES[name] for name in ("guidance_interval", "deep_cache")}
        keeps_the_promises(stages_of(built, family, **both), rows, exact)


@pytest.mark.parametrize(("task", "name"), FEW)
def test_no_mode_waits_for_the_device(built: dict[str, Path], task: str, name: str) -> None:
    family = of(task, name)
    for mode, options in MODES.items():
        if mode not in family.approximations:
            continue
        loop = Loop(built[id_of(family)], task, family)
        loop.stages = stages_of(built, family, **{mode: options})
        loop.count()
        case = loop.stages.encode(given(family))
        expected = loop.on_host(case)
        made = loop.on_device(case)
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
        assert loop.waits() == [], mode


@pytest.mark.parametrize(("task", "name"), FEW[:3])
def test_guidance_in_no_step_and_in_all(built: dict[str, Path], task: str, name: str) -> None:
    no_guidance_is_a_scale_of_one(built, of(task, name))


def no_guidance_is_a_scale_of_one(built: dict[str, Path], family: Family) -> None:
    """So the half that is left is the conditional one, and nothing else of the call changes."""
    plain = stages_of(built, family)
    none = stages_of(built, family, guidance_interval=[0.0, 0.01])
    rows, unguided = given(family), given(family, guidance_scale=1.0)
    assert torch.equal(latents(none, rows), latents(plain, unguided))
    assert torch.equal(latents(none, unguided), latents(plain, unguided)), "nothing to leave out"
    every = stages_of(built, family, guidance_interval=[0.01, 1.0])
    assert torch.equal(latents(every, rows), latents(plain, rows))


@pytest.mark.parametrize(
    ("task", "strength", "sizes"),
    [
        ("text-to-image", None, [2, 2, 4, 4, 4, 4, 2, 2]),
        ("image-to-image", 0.5, [2, 4, 4, 2]),  # of the steps that the call runs
    ],
)
def test_which_steps_are_guided(
    built: dict[str, Path], task: str, strength: float | None, sizes: list[int]
) -> None:
    family = of(task, "stable-diffusion")
    stages = stages_of(built, family, guidance_interval=[0.25, 0.75])
    rows = given(family, strength=strength, scheduler="DDIMScheduler")
    with counted(stages.denoise.pipeline.unet.mid_block) as seen:
        latents(stages, rows)
    assert seen == sizes


def test_the_interval_is_that_of_diffusers_guiders() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75)
    inside = []
    for step in range(STEPS):
        guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(step))
        inside.append(guider.num_conditions == 2)
    assert inside == [False, False, True, True, True, True, False, False]


def test_deep_blocks_are_left_out(built: dict[str, Path]) -> None:
    family = of("text-to-image", "stable-diffusion")
    stages = stages_of(built, family, deep_cache={"cache_interval": 3})
    unet = stages.denoise.pipeline.unet
    deep, shallow = unet.mid_block.resnets[0], unet.down_blocks[0].resnets[0]
    rows = given(family, scheduler="DDIMScheduler")
    with counted(deep) as inside, counted(shallow) as outside:
        latents(stages, rows)
    assert (len(inside), len(outside)) == (3, STEPS)
    # With a guided part, the first step of each size is computed completely.
    both = stages_of(built, family, **{name: MODES[name] for name in list(MODES)[:2]})
    with counted(both.denoise.pipeline.unet.mid_block.resnets[0]) as sizes:
        latents(both, rows)
    assert sizes == [2, 4, 4, 2]


def test_a_step_with_deep_features_is_that_of_the_paper(built: dict[str, Path]) -> None:
    """The last block gets the features of an earlier step, and all else is of this one."""
    family = of("text-to-image", "stable-diffusion")
    unet = stages_of(built, family, deep_cache={"cache_interval": 2}).denoise.pipeline.unet
    plain = stages_of(built, family).denoise.pipeline.unet
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, *unet.conv_in.weight.shape[1:2], 8, 8)
    words = torch.randn(2, 5, unet.config.cross_attention_dim)
    kept = []
    handle = plain.up_blocks[-2].register_forward_hook(lambda _, __, made: kept.append(made))
    with torch.no_grad():
        plain(first, 500, words)
        handle.remove()
        known = kept[0]
        plain.up_blocks[-2].register_forward_hook(lambda _, __, made: known)
        wanted = plain(second, 400, words).sample
        assert torch.equal(
            unet(first, 500, words).sample, plain_of(built)(first, 500, words).sample
        )
        assert torch.equal(unet(second, 400, words).sample, wanted)


def plain_of(built: dict[str, Path]) -> Any:
    return stages_of(built, of("text-to-image", "stable-diffusion")).denoise.pipeline.unet


def test_a_unet_without_deep_blocks(built: dict[str, Path]) -> None:
    from batchgen.models.approximate import DeepCached

    flat = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(
        ModelError, match=r"sampling\.approximate\.deep_cache: the U-Net has one block"
    ):
        DeepCached([flat], 2)


@pytest.mark.parametrize(
    ("mode", "config"),
    [
        (
            {"mag_cache": {}},
            MagCacheConfig(num_inference_steps=STEPS, mag_ratios=FLUX_MAG_RATIOS),
        ),
        (
            {"taylor_seer": {"cache_interval": 2, "disable_cache_before_step": 2}},
            TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
            ),
        ),
    ],
    ids=["mag_cache", "taylor_seer"],
)
def test_as_the_plain_pipeline_with_that_cache(
    built: dict[str, Path], mode: dict[str, Any], config: Any
) -> None:
    family = of("text-to-image", "flux")
    rows, exact = given(family), stages_of(built, family)
    exact.denoise.pipeline.transformer.enable_cache(config)
    assert torch.equal(latents(stages_of(built, family, **mode), rows), latents(exact, rows))


def test_mag_cache_skips_what_its_ratios_say(built: dict[str, Path]) -> None:
    family = of("text-to-image", "flux")
    stages = stages_of(built, family, mag_cache={"mag_ratios": [1.0] * STEPS})
    block = stages.denoise.pipeline.transformer.transformer_blocks[0].attn
    with counted(block) as seen:
        latents(stages, given(family))
    assert len(seen) == 3  # steps 0, 1 and 5: a fifth of the steps first, then at most three a row
    with counted(block) as seen:
        latents(stages, with_call(given(family), num_inference_steps=4))
    assert len(seen) == 1


def test_a_cache_that_is_refused_depends_on_the_neighbours(built: dict[str, Path]) -> None:
    """The first row hardly changes at the last step; its neighbour not at all, or completely."""
    stages = stages_of(built, of("text-to-image", "flux"))
    transformer = stages.denoise.pipeline.transformer
    calls: list[dict[str, Any]] = []
    handle = transformer.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True
    )
    latents(stages, batch([0, 1], call()))
    handle.remove()
    before = calls[0]
    noise = torch.randn(before["hidden_states"].shape, generator=torch.manual_seed(0))
    same, other = before["hidden_states"].clone(), before["hidden_states"].clone()
    same[0] += 0.05 * noise[0]
    other[0], other[1] = same[0], 100 * noise[1]

    @torch.no_grad()
    def first_row(states: torch.Tensor) -> torch.Tensor:
        transformer._reset_stateful_cache()
        given = (before, before, {**before, "hidden_states": states})
        for one in given:
            with transformer.cache_context("cond"):
                made = transformer(**one)[0]
        row: torch.Tensor = made[0]
        return row

    assert torch.equal(first_row(same), first_row(other)), "without a cache"
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.01))
    assert not torch.equal(first_row(same), first_row(other))


def tiny_vae(folder: Path, channels: int = 4, blocks: int = 2) -> Path:
    torch.manual_seed(3)
    widths = (8,) * blocks
    made = diffusers.AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
    )
    made.save_pretrained(folder)
    return folder


def with_tiny(built: dict[str, Path], family: Family, folder: Path) -> FamilyStages:
    fields = model_fields(family, built[id_of(family)])
    fields["components"] = {**fields.get("components", {}), "tiny_vae": str(folder)}
    sampling = {"approximate": "tiny_vae"}
    return FamilyStages(
        Path(fields.pop("path")), family.task, batch_size=2, sampling=sampling, **fields
    )


def latent_shape(built: dict[str, Path], family: Family) -> tuple[int, int]:
    """Channels of the latents, and the number of blocks of a VAE with their scale."""
    info = stages_of(built, family).info
    return info.latent_channels, info.vae_scale_factor.bit_length()


@pytest.mark.parametrize(("task", "name"), [*FEW[:4], ("control", "controlnet-xl")])
def test_a_tiny_autoencoder_decodes(
    built: dict[str, Path], tmp_path: Path, task: str, name: str
) -> None:
    a_tiny_autoencoder_decodes(built, of(task, name), tmp_path)


def a_tiny_autoencoder_decodes(built: dict[str, Path], family: Family, folder: Path) -> None:
    """As in diffusers, where it takes the place of the pipeline's VAE; the latents are the same."""
    rows, plain = given(family), stages_of(built, family)
    folder = tiny_vae(folder / "tiny", *latent_shape(built, family))
    tiny = with_tiny(built, family, folder)
    assert type(tiny.decode.pipeline.vae).__name__ == "AutoencoderTiny"
    assert "AutoencoderTiny" not in {
        type(one).__name__ for one in vars(tiny.encode.pipeline).values()
    }
    assert torch.equal(latents(tiny, rows), latents(plain, rows))
    made = tiny.fused(rows).pixels
    assert not np.array_equal(made, plain.fused(rows).pixels)
    assert np.array_equal(tiny.staged(rows).pixels, made)
    assert np.array_equal(tiny.fused(only(rows, 1)).pixels[0], made[1])
    assert tiny.info.manifest_sha256 != plain.info.manifest_sha256, "its files are counted"


def test_a_tiny_autoencoder_as_in_the_plain_pipeline(
    built: dict[str, Path], tmp_path: Path
) -> None:
    family = of("text-to-image", "stable-diffusion")
    tiny = with_tiny(built, family, tiny_vae(tmp_path / "tiny", *latent_shape(built, family)))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        built[id_of(family)], safety_checker=None, requires_safety_checker=False
    )
    pipeline.vae = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    pipeline.set_progress_bar_config(disable=True)
    rows = given(family)
    plain = pipeline(
        [one.prompt for one in rows.samples],
        negative_prompt=[one.negative_prompt for one in rows.samples],
        num_inference_steps=STEPS,
        guidance_scale=rows.call.guidance_scale,
        width=rows.call.width,
        height=rows.call.height,
        generator=generators(rows),
        output_type="np",
    ).images
    levels = np.abs(tiny.fused(rows).pixels.astype(int) - (plain * 255).round().astype(int))
    assert levels.max() <= 1


@pytest.mark.parametrize(
    ("channels", "blocks", "told"),
    [(3, 3, "latent channels is 3 there, but 4"), (4, 2, "pixels per latent is 2 there, but 4")],
)
def test_a_tiny_autoencoder_for_other_latents(
    built: dict[str, Path], tmp_path: Path, channels: int, blocks: int, told: str
) -> None:
    family = of("text-to-image", "stable-diffusion")
    with pytest.raises(ModelError, match=told):
        with_tiny(built, family, tiny_vae(tmp_path / "tiny", channels, blocks))
    with pytest.raises(ModelError, match="is a AutoencoderKL; allowed: AutoencoderTiny"):
        with_tiny(built, family, built[id_of(family)] / "vae")
