"""The small CLIP's training resumes exactly; the shipped one names classes and right captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from jobs.small_model.captions import DIGIT_WORDS, shape_caption
from jobs.small_model.card import read_card
from jobs.small_model.clip_captions import CLASSES, agreement, attributes, caption_of, false_caption
from jobs.small_model.clip_export import plain_of
from jobs.small_model.data import (
    COLOUR_NAMES,
    SHAPES,
    digit_images,
    digit_split,
    drawn_shapes,
)
from tests.model.test_small_model import run

MODEL = Path(__file__).parents[2] / "batchgen" / "shipped" / "digits-shapes-clip"
MOST_BYTES = 4 * 1000 * 1000


class Clip:
    """The shipped model as any user of transformers loads it."""

    def __init__(self) -> None:
        self.model = CLIPModel.from_pretrained(MODEL, local_files_only=True)
        self.tokenizer = CLIPTokenizer.from_pretrained(MODEL, local_files_only=True)
        self.pictures = CLIPImageProcessorPil.from_pretrained(MODEL, local_files_only=True)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosine of each of ``images`` (N, 3, 32, 32) uint8 and each text: (N, T)."""
        opened = [Image.fromarray(one) for one in images.permute(0, 2, 3, 1).numpy()]
        pixels = self.pictures(opened, return_tensors="pt").pixel_values
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        made = self.model(pixel_values=pixels, **tokens)
        return made.image_embeds @ made.text_embeds.T


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="does not meet"):  # nothing was learnt
        run("clip", target, "--out", whole, "--smoke", "--images", "20")
    assert not target.exists()
    said = run("clip", target, "--out", parts, "--smoke", "--images", "20", "--stop-at", "2")
    assert "stopped early" in said
    with pytest.raises(ValueError, match="does not meet"):
        run("clip", target, "--out", parts, "--smoke", "--images", "20")
    one, two = (torch.load(out / "clip.pt", weights_only=True) for out in (whole, parts))
    assert all(
        torch.equal(one["averaged"][name], two["averaged"][name]) for name in two["averaged"]
    )


def test_a_caption_is_true_of_what_it_names_and_a_false_one_is_not() -> None:
    digits, shapes = digit_images(digit_split().test[:40]), drawn_shapes(200, 9)
    shown = attributes(digits.labels, shapes.labels)
    generator = torch.Generator().manual_seed(4)
    true = [caption_of(row, generator) for row in shown.tolist()]
    false = [false_caption(row, generator) for row in shown.tolist()]
    assert bool(agreement(true, shown).diagonal().all())
    assert not bool(agreement(false, shown).diagonal().any())


def test_the_shipped_clip_is_small_and_complete() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".txt"}
    values = load_file(MODEL / "model.safetensors").values()
    assert all(bool(torch.isfinite(value).all()) for value in values)
    assert json.loads((MODEL / "config.json").read_text())["dtype"] == "float32"


def test_the_card_names_its_figures() -> None:
    card, readme = read_card(MODEL), (MODEL / "README.md").read_text()
    assert card["classes"] == list(CLASSES)
    for name, bar in card["bars"].items():
        assert card["metrics"][name] >= bar, name
        assert f"{card['metrics'][name]:.3f}" in readme


def test_it_is_loaded_as_float32_and_reads_any_text_and_size(clip: Clip) -> None:
    assert clip.model.dtype == torch.float32
    images = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8)
    scores = clip(images, ["", "漢字 🎉 " * 8])
    assert scores.shape == (3, 2) and bool(torch.isfinite(scores).all())


def test_it_names_the_class_of_pictures_it_never_saw(clip: Clip) -> None:
    prompts = [plain_of(kind).text for kind in range(len(CLASSES))]
    digits = digit_images(digit_split().test)
    assert (
        float((clip(digits.images, prompts).argmax(1) == digits.labels[:, 0]).float().mean()) > 0.95
    )
    shapes = drawn_shapes(300, 77)
    named = clip(shapes.images, prompts).argmax(1) - len(DIGIT_WORDS)
    assert float((named == shapes.labels[:, 0]).float().mean()) > 0.95


def test_the_right_caption_is_clearly_above_others(clip: Clip) -> None:
    shapes = drawn_shapes(200, 78)
    texts = [
        shape_caption(SHAPES[shape], COLOUR_NAMES[front], COLOUR_NAMES[back])
        for shape, front, back, _ in shapes.labels.tolist()
    ]
    scores = clip(shapes.images, texts)
    right, others = scores.diagonal(), scores[~torch.eye(len(texts), dtype=torch.bool)]
    assert float(right.mean()) > float(others.mean()) + 0.4
    assert float(right.min()) > float(others.mean())


def test_padding_does_not_change_a_text(clip: Clip) -> None:
    images = drawn_shapes(4, 79).images
    alone = clip(images, ["a star"])
    beside = clip(images, ["a star", "a picture of a small red circle on a blue background"])
    assert functional.mse_loss(alone[:, 0], beside[:, 0]) < 1e-10
