"""Tiny models for scorers, of real transformers classes with seeded random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from batchgen.models.tiny.parts import clip_tokenizer, seeded

SIDE = 32
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}


def _processor(folder: Path, **changes: Any) -> None:
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, **changes).save_pretrained(folder)


def clip(folder: Path, seed: int = 7) -> Path:
    """A CLIP with 24 features; its tokenizer has a token for each letter."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(folder)
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 37},
        **{"num_hidden_layers": 2, "num_attention_heads": 4},
        **{"max_position_embeddings": tokenizer.model_max_length},
        **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    with seeded(seed):
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    return folder


def classifier(folder: Path, names: list[str], seed: int = 7) -> Path:
    """A vision transformer with these classes."""
    config = transformers.ViTConfig(
        **_VISION,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    with seeded(seed):
        model = transformers.ViTForImageClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    _processor(folder)
    return folder


def convolutional(folder: Path, seed: int = 7) -> Path:
    """A ResNet of 16 features."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    with seeded(seed):
        model = transformers.ResNetModel(config)
    model.save_pretrained(folder)
    _processor(folder)
    return folder


def detector(folder: Path, names: list[str], seed: int = 7) -> Path:
    """A YOLOS with these classes, which sees five things in each image."""
    config = transformers.YolosConfig(
        **{**_VISION, "image_size": [SIDE, SIDE]},
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    with seeded(seed), torch.no_grad():
        model = transformers.YolosForObjectDetection(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.class_labels_classifier.layers[-1].bias[-1] = -1e4  # never "nothing"
        model.bbox_predictor.layers[-1].weight *= 0.1  # boxes of about half the image
    model.save_pretrained(folder)
    transformers.YolosImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_pad=False
    ).save_pretrained(folder)
    return folder


def image_model(
    folder: Path, name: str, config: Mapping[str, Any] | None = None, **how: Any
) -> Path:
    """A tiny image model of this class of transformers; ``config``: its own settings."""
    kind = getattr(transformers, name).config_class
    made = kind(**(_VISION if config is None else config))
    with seeded(7):
        model = getattr(transformers, name)(made, **how)
    model.save_pretrained(folder)
    _processor(folder)
    return folder
