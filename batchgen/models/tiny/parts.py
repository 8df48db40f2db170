"""Components shared by the tiny models: real diffusers classes with seeded random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_TOKENS = 16
HIDDEN = 32
SIZE = 32  # pixels of a tiny model's images, unless its kind needs larger ones
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@contextmanager
def seeded(seed: int = 7) -> Iterator[None]:
    """Seed torch inside the context, so that weights are equal everywhere; restore it after."""
    import torch

    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer with one token for each letter, no merges. Its files go to ``folder``."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)


def clip_text_config(tokenizer: Any, **changes: Any) -> Any:
    """A CLIP text configuration of two layers; ``changes`` replace its fields."""
    from transformers import CLIPTextConfig

    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**fields, **changes})


def clip_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(clip_text_config(tokenizer))


def unet(sample_size: int, in_channels: int, out_channels: int = 4, **changes: Any) -> Any:
    """A U-Net with cross-attention of width 32; ``changes`` replace fields of its configuration."""
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": HIDDEN,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**fields, **changes})


def autoencoder(factor: int = 4, channels: int = 4, **changes: Any) -> Any:
    """An ``AutoencoderKL``; ``factor`` is 4 or 8: pixels per latent, each way."""
    from diffusers import AutoencoderKL

    blocks = {4: (16, 16, 32), 8: (16, 16, 16, 32)}[factor]
    fields: dict[str, Any] = {
        "block_out_channels": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 8,
        "sample_size": SIZE,
    }
    return AutoencoderKL(**{**fields, **changes})
