"""Measures the small CLIP on pictures it never saw, and writes it as a folder of transformers."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from jobs.small_model.added import training_figures
from jobs.small_model.captions import DIGIT_WORDS, digit_caption, shape_caption
from jobs.small_model.card import CARD_FILE, README_FILE
from jobs.small_model.clip import parameters_of, similarities
from jobs.small_model.clip_captions import (
    CLASSES,
    PLAIN_DIGITS,
    PLAIN_SHAPES,
    attributes,
    false_caption,
    plain_caption,
)
from jobs.small_model.clip_card import readme_of
from jobs.small_model.data import (
    COLOUR_NAMES,
    SHAPES,
    digit_images,
    digit_split,
    drawn_shapes,
    to_model_range,
)
from jobs.small_model.evaluate import generate, load, shape_requests
from jobs.small_model.export import swap
from jobs.small_model.judges import fit_digit_judge, fit_shape_judge
from jobs.small_model.loop import StageResult
from jobs.small_model.recipe import IMAGE_SIZE, AddedRecipe
from jobs.small_model.tokenizer import build_tokenizer, save_tokenizer

HELD_OUT_SEED: Final = 5_000
WRONG_SEED: Final = 6_000
BATCH: Final = 250
BARS: Final = {"digit_accuracy": 0.95, "shape_accuracy": 0.95, "right_above_wrong": 0.95}
MEAN: Final = [0.5, 0.5, 0.5]
# The plain captions that classes are told apart by; an index into each list of plain captions.
PROMPT_DIGIT, PROMPT_SHAPE = PLAIN_DIGITS.index("the digit {word}"), PLAIN_SHAPES.index("{a_word}")


@dataclass(frozen=True)
class Unseen:
    """Pictures that were never trained on, and what they show: (N, 3, 32, 32) uint8, (N, 4)."""

    images: torch.Tensor
    shown: torch.Tensor


def export_clip(
    target: Path, model: CLIPModel, recipe: AddedRecipe, done: StageResult, images: int
) -> dict[str, Any]:
    """Measure the model and, if it meets its bars, write it to ``target``.

    Raises:
        ValueError: it does not; nothing is written.
    """
    tokenizer = build_tokenizer()
    stored = copy.deepcopy(model).half().float().eval()
    found = clip_metrics(stored, tokenizer, images)
    if not all(found[name] >= bar for name, bar in BARS.items()):
        raise ValueError(f"{found} does not meet {BARS}")
    found |= painted_metrics(stored, tokenizer, min(images, 320))
    card = {
        "name": target.name,
        "prompts": [plain_of(kind).text for kind in range(len(CLASSES))],
        "classes": list(CLASSES),
        "parameters": parameters_of(model),
        "training": training_figures(recipe, done),
        "metrics": found,
        "bars": BARS,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_folder(model, tokenizer, staging)
        (staging / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
        (staging / README_FILE).write_text(readme_of(card))
        staging.chmod(0o755)
        swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return found


def write_folder(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save model, tokenizer and image processor; weights as float16, to be loaded as float32."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=size,
        image_mean=MEAN,
        image_std=MEAN,
    )
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    pictures.save_pretrained(folder)
    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    for tower in ("text_config", "vision_config"):
        config[tower]["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)


def clip_metrics(model: CLIPModel, tokenizer: CLIPTokenizer, images: int) -> dict[str, Any]:
    """Zero-shot accuracy and the margin of right over wrong captions, on unseen pictures."""
    real = digit_images(digit_split().test)
    drawn = drawn_shapes(images, HELD_OUT_SEED)
    none = torch.empty((0, 4), dtype=torch.long)
    digits = Unseen(real.images, attributes(real.labels, none))
    shapes = Unseen(drawn.images, attributes(none[:, :1], drawn.labels))
    prompts = [plain_of(kind).text for kind in range(len(CLASSES))]
    right_digits = _guessed(model, tokenizer, digits.images, prompts) == digits.shown[:, 0]
    right_shapes = _guessed(model, tokenizer, shapes.images, prompts) == shapes.shown[:, 0]
    return {
        "classes": len(CLASSES),
        "digits": len(real),
        "shapes": images,
        "digit_accuracy": _share(right_digits),
        "shape_accuracy": _share(right_shapes),
        "weakest_class": _weakest(
            torch.cat((right_digits, right_shapes)),
            torch.cat((digits.shown[:, 0], shapes.shown[:, 0])),
        ),
        **_margins(model, tokenizer, [digits, shapes]),
    }


def plain_of(kind: int) -> Any:
    """The caption by which a class is told from the others."""
    return plain_caption(kind, PROMPT_DIGIT if kind < len(DIGIT_WORDS) else PROMPT_SHAPE)


@torch.no_grad()
def scores(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: torch.Tensor, texts: list[str]
) -> torch.Tensor:
    """Cosine of each of ``images`` (N, 3, 32, 32) uint8 and each text: (N, T)."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids  # (T, L)
    parts = [similarities(model, to_model_range(some), tokens).T for some in images.split(BATCH)]
    return torch.cat(parts)


def _guessed(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    return scores(model, tokenizer, images, prompts).argmax(1)


def _margins(model: CLIPModel, tokenizer: CLIPTokenizer, sets: list[Unseen]) -> dict[str, Any]:
    """A caption that is right against one that is wrong in one attribute."""
    generator = torch.Generator().manual_seed(WRONG_SEED)
    right, wrong = [], []
    for unseen in sets:
        for start in range(0, len(unseen.images), BATCH):
            images = unseen.images[start : start + BATCH]
            shown = unseen.shown[start : start + BATCH].tolist()
            true = [_true_text(row) for row in shown]
            false = [false_caption(row, generator).text for row in shown]
            right.append(scores(model, tokenizer, images, true).diagonal())
            wrong.append(scores(model, tokenizer, images, false).diagonal())
    a, b = torch.cat(right), torch.cat(wrong)
    return {
        "right_similarity": round(float(a.mean()), 4),
        "wrong_similarity": round(float(b.mean()), 4),
        "right_above_wrong": _share(a > b),
    }


def _true_text(shown: list[int]) -> str:
    kind, front, back, _ = shown
    if kind < len(DIGIT_WORDS):
        return digit_caption(kind)
    return shape_caption(CLASSES[kind], COLOUR_NAMES[front], COLOUR_NAMES[back])


def painted_metrics(model: CLIPModel, tokenizer: CLIPTokenizer, images: int) -> dict[str, Any]:
    """Agreement with the judges on pictures of the shipped generator."""
    prompts = [plain_of(kind).text for kind in range(len(CLASSES))]
    folder = Path(__file__).parents[2] / "batchgen" / "shipped" / "digits-shapes"
    card, pipeline = json.loads((folder / CARD_FILE).read_text()), load(folder)
    digits, shapes = torch.arange(images) % 10, shape_requests(images)
    captions = [digit_caption(digit) for digit in digits.tolist()]
    made = generate(pipeline, captions, card, 2)
    drawn = [
        shape_caption(SHAPES[shape], COLOUR_NAMES[front], COLOUR_NAMES[back])
        for shape, front, back in shapes.tolist()
    ]
    shape_made = generate(pipeline, drawn, card, 3)
    judged = fit_digit_judge().digits(made)
    shape_judged = fit_shape_judge().labels(shape_made)[:, 0] + len(DIGIT_WORDS)
    return {
        "painted": images,
        "painted_digits_as_judged": _share(_guessed(model, tokenizer, made, prompts) == judged),
        "painted_shapes_as_judged": _share(
            _guessed(model, tokenizer, shape_made, prompts) == shape_judged
        ),
    }


def _weakest(right: torch.Tensor, kinds: torch.Tensor) -> dict[str, float]:
    by_class = {name: _share(right[kinds == kind]) for kind, name in enumerate(CLASSES)}
    name = min(by_class, key=lambda one: by_class[one])
    return {name: by_class[name]}


def _share(right: torch.Tensor) -> float:
    return round(float(right.float().mean()), 4)
