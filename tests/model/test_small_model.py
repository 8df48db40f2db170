"""The small model's training resumes exactly; the shipped model is complete and follows prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from jobs.small_model.__main__ import main
from jobs.small_model.captions import shape_caption
from jobs.small_model.card import CARD_FILE, SPLIT_FILE, read_card
from jobs.small_model.data import COLOURS, digit_images, digit_split, drawn_shapes

MODEL = Path(__file__).parents[2] / "batchgen" / "shipped" / "digits-shapes"
MOST_BYTES = 10 * 1000 * 1000


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    averaged: dict[str, torch.Tensor] = torch.load(out / stage, weights_only=True)["averaged"]
    return averaged


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "run"
    assert "done" in run("train", "--out", out, "--smoke")
    return out


@pytest.fixture(scope="module")
def shipped() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_interrupted_run_ends_with_the_same_bits(smoke_run: Path, tmp_path: Path) -> None:
    for stop_at in ("3", "9"):  # within the VAE, within the denoiser
        assert "stopped early" in run("train", "--out", tmp_path, "--smoke", "--stop-at", stop_at)
    assert "done" in run("train", "--out", tmp_path, "--smoke")
    for stage in ("vae.pt", "denoiser.pt"):
        whole, parts = weights(smoke_run, stage), weights(tmp_path, stage)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_refuses_another_recipe(smoke_run: Path) -> None:
    with pytest.raises(ValueError, match=r"another recipe; give a new --out"):
        run("train", "--out", smoke_run, "--smoke", "--seed", "1")


def test_an_export_is_a_pipeline_without_naming_a_dtype(smoke_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    for _ in range(2):  # the second replaces the first
        run("export", "--out", smoke_run, target)
    pipeline = StableDiffusionPipeline.from_pretrained(target, local_files_only=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    pictures = pipeline(["", "漢字 🎉 " * 50], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (2, 32, 32, 3)
    assert np.isfinite(pictures).all()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_drawings_are_a_function_of_the_seed() -> None:
    one, two, other = drawn_shapes(8, 1), drawn_shapes(8, 1), drawn_shapes(8, 2)
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, other.images)
    assert bool((one.labels[:, 1] != one.labels[:, 2]).all())


def test_the_shipped_model_is_small_and_safetensors_only() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".md", ".png", ".safetensors", ".txt"}
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {path.name for path in files}
    for path in MODEL.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(value).all()) for value in load_file(path).values()), path


def test_the_written_split_is_the_one_used() -> None:
    written = json.loads((MODEL / SPLIT_FILE).read_text())
    assert written == digit_split().to_dict()
    assert set(written["train"]).isdisjoint(written["test"])
    assert (len(written["train"]), len(written["test"])) == (1_297, 500)


def test_the_tokenizer_loads_from_either_form_and_takes_any_text(tmp_path: Path) -> None:
    directory = MODEL / "tokenizer"
    whole = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    older = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("", "a red circle on a blue background", "Ünïcödé 漢字 🎉\n it's \x00 7"):
        ids = whole(text).input_ids
        assert ids == older(text).input_ids
        assert ids[0] == whole.bos_token_id and ids[-1] == whole.eos_token_id
        assert whole.unk_token_id not in ids[1:-1]


def test_the_card_names_its_figures() -> None:
    card, readme = read_card(MODEL), (MODEL / "README.md").read_text()
    metrics = card["metrics"]
    assert metrics["images_per_bar"] == 1_000
    for name, bar in metrics["bars"].items():
        assert metrics[name] >= bar, name
        assert f"{metrics[name]:.3f}" in readme
    assert CARD_FILE in readme and SPLIT_FILE in readme


def test_the_shipped_model_paints_the_colours_asked_for(shipped: StableDiffusionPipeline) -> None:
    wanted = [("red", "blue"), ("yellow", "black"), ("green", "white"), ("purple", "orange")]
    prompts = [shape_caption("circle", front, back, "large") for front, back in wanted]
    settings = read_card(MODEL)["recommended"]
    pictures = shipped(
        prompts, generator=torch.Generator().manual_seed(7), output_type="np", **settings
    ).images  # (4, 32, 32, 3)
    for picture, (front, back) in zip(pictures, wanted, strict=True):
        corners = np.median(picture[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
        assert nearest_colour(corners) == back
        assert nearest_colour(np.median(picture[13:19, 13:19], axis=(0, 1))) == front


def test_image_to_image_keeps_a_digit(shipped: StableDiffusionPipeline) -> None:
    pipeline = StableDiffusionImg2ImgPipeline(**shipped.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    source = digit_images(digit_split().test[:4])
    start = source.images / 255.0  # (4, 3, 32, 32)
    prompts = [f"a handwritten {digit}" for digit in source.labels[:, 0].tolist()]
    output = pipeline(
        prompts,
        image=start,
        strength=0.4,
        num_inference_steps=12,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images  # (4, 3, 32, 32)
    likeness = [
        float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])
        for a, b in zip(start, output, strict=True)
    ]
    assert min(likeness) > 0.6


def nearest_colour(pixel: np.ndarray) -> str:
    distances = {
        name: float(np.abs(np.array(value) / 255 - pixel).sum()) for name, value in COLOURS.items()
    }
    return min(distances, key=lambda name: distances[name])
