"""Tiny models of the LDM paper's pipelines, and of DiT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny.parts import HIDDEN, LETTERS, SIZE, autoencoder, seeded, unet

CLASSES = ("star", "circle", "square")
TOKENS = 77  # LDMTextToImagePipeline pads to this many


def vq_autoencoder(factor: int = 4) -> Any:
    """A ``VQModel`` of three latent channels, with a codebook of the width of the latents."""
    from diffusers import VQModel

    blocks = {4: (16, 16, 32), 8: (16, 16, 16, 32)}[factor]
    model = VQModel(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    model.quantize.embedding.weight.data.normal_(std=4.0)
    return model


def unconditional_unet(sample_size: int, in_channels: int, out_channels: int) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )


def ddim(**changes: Any) -> Any:
    """The paper's training schedule; ``changes`` replace fields of its configuration."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        **changes,
    )


def build_unconditional(folder: Path) -> Path:
    """``LDMPipeline`` with a ``VQModel`` and DDIM."""
    from diffusers import LDMPipeline

    with seeded():
        LDMPipeline(
            vqvae=vq_autoencoder(), unet=unconditional_unet(SIZE // 4, 3, 3), scheduler=ddim()
        ).save_pretrained(folder)
    return folder


def build_unconditional_kl(folder: Path) -> Path:
    """``LDMPipeline`` with an ``AutoencoderKL`` and DDPM."""
    from diffusers import DDPMScheduler, LDMPipeline

    with seeded():
        LDMPipeline(
            vqvae=autoencoder(),
            unet=unconditional_unet(SIZE // 4, 4, 4),
            scheduler=DDPMScheduler(clip_sample=False),
        ).save_pretrained(folder)
    return folder


def build_dit(folder: Path) -> Path:
    """``DiTPipeline`` of 1000 classes, since the pipeline uses number 1000 for no class."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with seeded():
        DiTPipeline(
            transformer=DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                sample_size=SIZE // 4,
                num_embeds_ada_norm=1000,
            ),
            vae=autoencoder(),
            scheduler=DDIMScheduler(clip_sample=False),
        ).save_pretrained(folder)
    index = folder / "model_index.json"
    labels = {str(number): name for number, name in enumerate(CLASSES)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}, indent=2))
    return folder


def build_class(folder: Path) -> Path:
    """A U-Net with cross-attention to the embedding of a class.

    A ``StableDiffusionPipeline`` without a text encoder, and with the component ``class_embedder``
    (see ``models.own.ClassEmbedder``).
    """
    from diffusers import StableDiffusionPipeline

    from batchgen.models.own import ClassEmbedder

    with seeded():
        labels = {str(number): name for number, name in enumerate(CLASSES)}
        StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            unet=unet(SIZE // 4, 4),
            scheduler=ddim(steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        ClassEmbedder(len(CLASSES), HIDDEN, labels).save_pretrained(folder / "class_embedder")
    index = folder / "model_index.json"
    entry = {"class_embedder": ["batchgen", "ClassEmbedder"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **entry}, indent=2))
    return folder


def bert_tokenizer() -> Any:
    """A BERT tokenizer with one token for each letter."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer({word: index for index, word in enumerate(words)}, model_max_length=TOKENS)


def bert(tokenizer: Any) -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=TOKENS,
            encoder_layers=2,
            encoder_ffn_dim=48,
            encoder_attention_heads=4,
            head_dim=8,
            d_model=HIDDEN,
            init_std=0.5,
        )
    )


def build_bert(folder: Path) -> Path:
    """``LDMTextToImagePipeline`` with an ``AutoencoderKL`` of factor 8, as the published model."""
    from diffusers import LDMTextToImagePipeline

    with seeded():
        tokenizer = bert_tokenizer()
        LDMTextToImagePipeline(
            vqvae=autoencoder(8),
            bert=bert(tokenizer),
            tokenizer=tokenizer,
            unet=unet(SIZE // 8, 4),
            scheduler=ddim(),
        ).save_pretrained(folder)
    return folder


def build_super_resolution(folder: Path) -> Path:
    """``LDMSuperResolutionPipeline``: 32 to 128 pixels."""
    from diffusers import LDMSuperResolutionPipeline

    with seeded():
        LDMSuperResolutionPipeline(
            vqvae=vq_autoencoder(), unet=unconditional_unet(SIZE, 6, 3), scheduler=ddim()
        ).save_pretrained(folder)
    return folder


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("unconditional", "ldm"): build_unconditional,
    ("class-conditional", "dit"): build_dit,
    ("class-conditional", "ldm-class"): build_class,
    ("text-to-image", "ldm-bert"): build_bert,
    ("super-resolution", "ldm-super-resolution"): build_super_resolution,
}
