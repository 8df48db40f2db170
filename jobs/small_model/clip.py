"""The small CLIP: two towers that learn which captions are true of which pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from jobs.small_model.added import Batch, draw_batch, images_for
from jobs.small_model.clip_captions import (
    agreement,
    attributes,
    caption_of,
    false_caption,
)
from jobs.small_model.data import LabelledImages, to_model_range
from jobs.small_model.denoiser import LatentPool
from jobs.small_model.judges import worn
from jobs.small_model.loop import StageResult, run_stage, step_generator
from jobs.small_model.recipe import IMAGE_SIZE, MAX_TOKENS, AddedRecipe
from jobs.small_model.tokenizer import build_tokenizer

CLIP_FILE: Final = "clip.pt"
WIDTH: Final = 128
TOWER: Final = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
VISION_LAYERS: Final = 4
TEXT_LAYERS: Final = 2
PATCH: Final = 8
PROJECTION: Final = 64


def train_clip(out: Path, recipe: AddedRecipe, stop_at: int | None = None) -> StageResult:
    """Train the two towers, going on from the checkpoint in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    digits, shapes = images_for(recipe)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer, recipe.seed)
    loss = partial(clip_loss, model, tokenizer, digits, shapes, recipe)
    return run_stage("clip", model, loss, recipe.stage, out / CLIP_FILE, stop_at)


def build_clip(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """The model with weights drawn from the seed."""
    torch.manual_seed(seed + 9)
    config = CLIPConfig(
        text_config={
            **TOWER,
            "num_hidden_layers": TEXT_LAYERS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": PROJECTION,
        },
        vision_config={
            **TOWER,
            "num_hidden_layers": VISION_LAYERS,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "projection_dim": PROJECTION,
        },
        projection_dim=PROJECTION,
    )
    return CLIPModel(config).train()


def clip_loss(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    digits: LabelledImages,
    shapes: LabelledImages,
    recipe: AddedRecipe,
    step: int,
) -> torch.Tensor:
    """Contrast of one batch, both ways; several captions may be true of a picture (UniCL).

    Beside a true caption, each picture brings one that is wrong in one attribute.
    """
    generator = step_generator(recipe.seed + 10, step)
    pools = LatentPool(digits.images, digits.labels), LatentPool(shapes.images, shapes.labels)
    batch = draw_batch(*pools, recipe, generator)
    shown = attributes(digits.labels[batch.digits], shapes.labels[batch.shapes])  # (B, 4)
    captions = [caption_of(row, generator) for row in shown.tolist()]
    captions += [false_caption(row, generator) for row in shown.tolist()]
    pixels = worn(to_model_range(_pictures(digits, shapes, batch)), generator)  # (B, 3, 32, 32)
    encoded = tokenizer([one.text for one in captions], padding=True, return_tensors="pt")
    scores = similarities(model, pixels, encoded.input_ids) * model.logit_scale.exp()  # (2B, B)
    true = agreement(captions, shown)  # (2B, B)
    return _contrast(scores.T, true.T) + _contrast(scores, true)


def similarities(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cosine of each text (T, L) and each picture (N, 3, H, W): (T, N)."""
    images = model.get_image_features(pixels).pooler_output  # (N, D)
    texts = model.get_text_features(tokens).pooler_output  # (T, D)
    return functional.normalize(texts, dim=1) @ functional.normalize(images, dim=1).T


def _contrast(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each row's true columns (R, C); rows without one are left out."""
    kept = true.any(1)
    chosen = scores.log_softmax(1)[kept] * true[kept]
    return -(chosen.sum(1) / true[kept].sum(1)).mean()


def _pictures(digits: LabelledImages, shapes: LabelledImages, batch: Batch) -> torch.Tensor:
    return torch.cat((digits.images[batch.digits], shapes.images[batch.shapes]))


def parameters_of(model: nn.Module) -> int:
    """How many numbers the model holds."""
    return sum(value.numel() for value in model.parameters())
