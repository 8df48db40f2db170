"""Models whose weights are in one file, as the original code writes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models.tiny import ldm, stable_diffusion, stable_diffusion_xl
from batchgen.models.tiny.parts import clip_text_config, seeded, unet
from batchgen.storage.cache import CACHE
from tests.family_stages import FamilyStages
from tests.ldm_layout import single_file
from tests.model_folders import IMAGE, TEXT, edit, inspect, refusal, spec_of
from tests.source_pixels import pixels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion.build_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is fetched comes to lie."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def build_wide_xl(folder: Path, in_channels: int = 4) -> Path:
    """Tiny, with encoders of two widths, by which diffusers tells those of a single file apart."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    stable_diffusion_xl.build_base(folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    with seeded():
        config = clip_text_config(
            pipeline.tokenizer_2, hidden_size=64, projection_dim=32, hidden_act="gelu"
        )
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
        fields = dict(pipeline.unet.config) | {"cross_attention_dim": 96}
        sizes = ("sample_size", "in_channels", "out_channels")
        more = {key: one for key, one in fields.items() if key not in (*sizes, "_name_or_path")}
        pipeline.unet = unet(fields["sample_size"], in_channels, 4, **more)
    pipeline.save_pretrained(folder)
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "1.x": (stable_diffusion.build_stable_diffusion, "clip"),
    "2.x": (stable_diffusion.build_stable_diffusion, "open_clip"),
    "inpainting": (stable_diffusion.build_inpainting, "clip"),
    "xl": (build_wide_xl, "clip"),
    "xl-inpainting": (lambda folder: build_wide_xl(folder, 9), "clip"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Kind -> its folder, its weights in one file, and the folder without weights; made once."""
    parent = tmp_path_factory.mktemp("single")

    def made(kind: str) -> tuple[Path, Path, Path]:
        folder, file, config = (parent / f"{kind}{end}" for end in ("", ".safetensors", "-config"))
        if not folder.is_dir():
            build, text = KINDS[kind]
            single_file(build(folder), file, text)
            shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
        return folder, file, config

    return made


Files = Callable[[str], tuple[Path, Path, Path]]


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("1.x", TEXT),
        ("1.x", IMAGE),
        ("1.x", "inpainting"),
        ("2.x", TEXT),
        ("inpainting", "inpainting"),
        ("xl", TEXT),
        ("xl", IMAGE),
        ("xl-inpainting", "inpainting"),
    ],
)
def test_a_single_file_makes_the_images_of_its_folder(files: Files, kind: str, task: str) -> None:
    folder, file, config = files(kind)
    assert np.array_equal(pixels(folder, task), pixels(file, task, config=str(config)))


def test_each_stage_holds_its_parts_of_a_single_file(files: Files) -> None:
    _, file, config = files("xl")
    stages = FamilyStages(file, TEXT, config=str(config))
    assert stages.parts() == {
        "encoder": {"text_encoder", "text_encoder_2"},
        "denoiser": {"unet"},
        "decoder": {"vae"},
    }


def test_a_single_file_is_known_by_its_content(files: Files, tmp_path: Path) -> None:
    _, file, config = files("1.x")
    info = inspect(file, config=str(config))
    assert (info.model_id, info.path) == (str(file), str(file))
    assert info.revision == f"sha256:{info.manifest_sha256[:12]}"
    moved = Path(shutil.copy(file, tmp_path / "moved.safetensors"))
    assert inspect(moved, config=str(config)).manifest_sha256 == info.manifest_sha256
    ready = spec_of(moved, config=str(config))
    assert models.load_decoder(replace(info, path="/of/another/node"), ready).batch_size == 2
    weights = load_file(file)
    weights["first_stage_model.encoder.conv_in.bias"] += 1
    save_file(weights, moved)
    assert inspect(moved, config=str(config)).manifest_sha256 != info.manifest_sha256
    with pytest.raises(ModelError, match="is not the planned one"):
        models.load_decoder(replace(info, path="/of/a/third"), ready)


def test_a_single_file_and_its_configurations_may_stand_at_urls(files: Files, cache: Path) -> None:
    _, file, config = files("1.x")
    info = inspect(file.as_uri(), config=config.as_uri())
    assert info.manifest_sha256 == inspect(file, config=str(config)).manifest_sha256
    assert Path(info.path).parent.parent == cache
    assert np.array_equal(pixels(info.path, config=str(config)), pixels(file, config=str(config)))


def test_single_files_with_more_than_is_read_and_of_half_precision(
    files: Files, tmp_path: Path
) -> None:
    _, file, config = files("1.x")
    weights = {key: one.half() for key, one in load_file(file).items()}
    prefix = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    weights |= {prefix: torch.arange(16)[None], "alphas_cumprod": torch.zeros(1000)}
    save_file(weights, tmp_path / "half.safetensors")
    stages = FamilyStages(tmp_path / "half.safetensors", TEXT, config=str(config))
    held = stages.denoise.pipeline.unet.parameters()
    assert {parameter.dtype for parameter in held} == {torch.float32}


def test_single_files_that_cannot_be_used_are_refused(
    files: Files, saved: Path, tmp_path: Path
) -> None:
    _, file, config = files("1.x")
    given = {"config": str(config)}
    assert "a safetensors file with such a folder as model.config" in refusal(file)
    assert "only allowed if model.path is a single safetensors file" in refusal(saved, **given)
    assert "no such file" in refusal(tmp_path / "none.safetensors", **given)
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).touch()
        message = refusal(tmp_path / name, allow_pickle=True, **given)
        assert "a single file must be safetensors" in message
        assert "must be safetensors" in refusal(f"s3://bucket/{name}", **given)
    (tmp_path / "empty.safetensors").touch()
    assert "is not a safetensors file" in refusal(tmp_path / "empty.safetensors", **given)
    assert "model.config 'nowhere': no such folder" in refusal(file, config="nowhere")
    message = refusal(file, revision="main", **given)
    assert "which has no revisions; remove model.revision" in message


def test_a_single_file_of_another_model_is_refused(files: Files, tmp_path: Path) -> None:
    _, file, config = files("1.x")
    weights = load_file(file)
    without = {key: one for key, one in weights.items() if "first_stage" not in key}
    save_file(without, tmp_path / "without.safetensors")
    assert "vae: " in refusal(tmp_path / "without.safetensors", config=str(config))
    other = Path(shutil.copytree(config, tmp_path / "other"))
    edit(other / "vae" / "config.json", latent_channels=8)
    edit(other / "unet" / "config.json", in_channels=8)
    message = refusal(file, config=str(other))
    assert "by the configuration it is [32, 8]" in message
    _, wide, wide_config = files("xl")
    assert "attn2.to_k.weight is [64, 96], but by the configuration it is [64, 32]" in refusal(
        wide, config=str(config)
    )
    deep = Path(shutil.copytree(wide_config, tmp_path / "deep"))
    edit(deep / "unet" / "config.json", transformer_layers_per_block=2)
    with pytest.raises(ModelError, match=r"lacks weights that the configurations of .*deep need"):
        FamilyStages(wide, TEXT, config=str(deep))
    edit(deep / "unet" / "config.json", projection_class_embeddings_input_dim=128)
    with pytest.raises(ModelError, match=r"cannot be read with the configurations of .*deep"):
        FamilyStages(wide, TEXT, config=str(deep))
    last = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    save_file(
        {key: one for key, one in weights.items() if key != last}, tmp_path / "cut.safetensors"
    )
    with pytest.raises(ModelError, match="lacks weights of text_encoder, such as final_layer"):
        FamilyStages(tmp_path / "cut.safetensors", TEXT, config=str(config))


def test_kinds_of_which_diffusers_reads_no_single_file_are_refused(
    files: Files, tmp_path: Path
) -> None:
    _, file, _ = files("1.x")
    bert = ldm.build_bert(tmp_path / "bert")
    assert "cannot be read from a single file" in refusal(file, config=str(bert))
    base = stable_diffusion_xl.build_base(tmp_path / "base")
    same = single_file(base, tmp_path / "same.safetensors")
    message = refusal(same, config=str(base))
    assert "both text encoders have the width 32" in message
