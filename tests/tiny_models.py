"""Real diffusers components made tiny, with seeded random weights, saved in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

MAX_TOKENS = 16
HIDDEN = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells: one token a letter, no merges."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(sample_size: int, channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_vae(factor: int, channels: int) -> AutoencoderKL:
    """``factor`` is 4 or 8: pixels a latent, each way."""
    blocks = {4: (16, 16, 32), 8: (16, 16, 16, 32)}[factor]
    return AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
    )


def build_model(
    folder: Path,
    *,
    factor: int = 4,
    channels: int = 4,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Path:
    """Save a tiny Stable Diffusion of 32 x 32 pixels and return its folder."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(7)
    tokenizer = build_tokenizer(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=build_vae(factor, channels),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(32 // factor, channels),
        scheduler=PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.set_rng_state(generator_state)
    pipeline.to(dtype).save_pretrained(folder, variant=variant)
    return folder
