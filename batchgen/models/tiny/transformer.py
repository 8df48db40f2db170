"""Tiny models with transformers: PixArt, Stable Diffusion 3, Flux, Sana, Qwen-Image, Z-Image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny import transformer_text as text
from batchgen.models.tiny.parts import (
    HIDDEN,
    SIZE,
    autoencoder,
    clip_text_config,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
)

LOUD = 8.0  # factor by which prompts have more effect than with random weights
FACTOR = 4  # pixels per latent, each way
SHIFT = {"shift_factor": 0.0609, "scaling_factor": 1.5305}


def build_pixart_alpha(folder: Path) -> Path:
    """32 x 32 pixels, latents of 4 channels, T5."""
    import diffusers

    return _build_pixart(folder, diffusers.PixArtAlphaPipeline)


def build_pixart_sigma(folder: Path) -> Path:
    """Like PixArt-alpha, which reads another number of tokens."""
    import diffusers

    return _build_pixart(folder, diffusers.PixArtSigmaPipeline)


def _build_pixart(folder: Path, pipeline_class: Any) -> Path:
    import diffusers

    with seeded():
        tokenizer = text.t5_tokenizer()
        pipeline = pipeline_class(
            tokenizer=tokenizer,
            text_encoder=text.t5_encoder(tokenizer),
            vae=autoencoder(FACTOR, 4),
            transformer=_louder(
                diffusers.PixArtTransformer2DModel(
                    sample_size=SIZE // FACTOR,
                    in_channels=4,
                    out_channels=8,  # the second half is a variance, which the pipeline drops
                    num_layers=2,
                    num_attention_heads=4,
                    attention_head_dim=8,
                    cross_attention_dim=32,
                    caption_channels=HIDDEN,
                ),
                "attn2.to_v",
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_stable_diffusion_3(folder: Path, t5: bool = True) -> Path:
    """32 x 32 pixels, latents of 16 channels, two CLIPs and, if ``t5``, T5."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    with seeded():
        tokenizer = clip_tokenizer(folder / "tokenizer")
        t5_tokenizer = text.t5_tokenizer() if t5 else None
        config = clip_text_config(tokenizer, projection_dim=HIDDEN)
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=_louder(
                diffusers.SD3Transformer2DModel(
                    sample_size=SIZE // FACTOR,
                    patch_size=2,
                    in_channels=16,
                    out_channels=16,
                    num_layers=2,
                    attention_head_dim=8,
                    num_attention_heads=4,
                    joint_attention_dim=2 * HIDDEN,
                    caption_projection_dim=32,
                    pooled_projection_dim=2 * HIDDEN,
                    pos_embed_max_size=32,
                ),
                "add_v_proj",
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(FACTOR, 16, use_quant_conv=False, use_post_quant_conv=False, **SHIFT),
            text_encoder=CLIPTextModelWithProjection(config),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
            text_encoder_3=text.t5_encoder(t5_tokenizer, 2 * HIDDEN) if t5 else None,
            tokenizer_3=t5_tokenizer,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """Latents of 16 channels, CLIP and T5; with ``guidance_embeds`` like dev, without like schnell.

    No configuration of a Flux model has its size: batchgen assumes 128 latents, here 512 pixels.
    """
    import diffusers

    with seeded():
        tokenizer = clip_tokenizer(folder / "tokenizer")
        t5_tokenizer = text.t5_tokenizer()
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=guidance_embeds
            ),
            vae=autoencoder(FACTOR, 16, use_quant_conv=False, use_post_quant_conv=False, **SHIFT),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text.t5_encoder(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=_louder(
                diffusers.FluxTransformer2DModel(
                    in_channels=64,
                    num_layers=1,
                    num_single_layers=1,
                    attention_head_dim=8,
                    num_attention_heads=4,
                    joint_attention_dim=HIDDEN,
                    pooled_projection_dim=HIDDEN,
                    guidance_embeds=guidance_embeds,
                    axes_dims_rope=(4, 2, 2),
                ),
                "add_v_proj",
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_sana(folder: Path) -> Path:
    """64 x 64 pixels, 32 pixels per latent each way, Gemma."""
    import diffusers

    blocks = (8, 8, 8, 16, 16, 16)
    with seeded():
        tokenizer = text.gemma_tokenizer()
        pipeline = diffusers.SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=text.gemma_encoder(tokenizer),
            vae=diffusers.AutoencoderDC(
                latent_channels=8,
                attention_head_dim=8,
                encoder_block_types="ResBlock",
                decoder_block_types="ResBlock",
                encoder_block_out_channels=blocks,
                decoder_block_out_channels=blocks,
                encoder_layers_per_block=(1,) * len(blocks),
                decoder_layers_per_block=(1,) * len(blocks),
                scaling_factor=0.41407,
            ),
            transformer=_louder(
                diffusers.SanaTransformer2DModel(
                    in_channels=8,
                    out_channels=8,
                    num_layers=2,
                    num_attention_heads=4,
                    attention_head_dim=8,
                    num_cross_attention_heads=4,
                    cross_attention_head_dim=8,
                    cross_attention_dim=32,
                    caption_channels=HIDDEN,
                    sample_size=2,
                ),
                "attn2.to_",
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_qwen_image(folder: Path) -> Path:
    """Latents of 4 channels, 4 pixels per latent each way, Qwen2.5-VL; 512 pixels as in Flux."""
    import diffusers

    with seeded():
        tokenizer = text.qwen_tokenizer()
        pipeline = diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=diffusers.AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.1, 0.9, 1.2, 1.0],
            ),
            text_encoder=text.qwen_vl_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_louder(
                diffusers.QwenImageTransformer2DModel(
                    in_channels=16,
                    out_channels=4,
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=HIDDEN,
                    axes_dims_rope=(8, 4, 4),
                ),
                "add_v_proj",
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_z_image(folder: Path) -> Path:
    """Latents of 16 channels, 4 pixels per latent each way, Qwen3; 512 pixels as in Flux."""
    import diffusers

    with seeded():
        tokenizer = text.qwen_tokenizer()
        pipeline = diffusers.ZImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(FACTOR, 16, use_quant_conv=False, use_post_quant_conv=False, **SHIFT),
            text_encoder=text.qwen_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=diffusers.ZImageTransformer2DModel(
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=HIDDEN,
                axes_dims=[8, 4, 4],
                axes_lens=[1024, 128, 128],
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def _louder(transformer: Any, part: str) -> Any:
    """Scale up the weights of the transformer whose name contains ``part``."""
    for name, parameter in transformer.named_parameters():
        if part in name:
            parameter.data.mul_(LOUD)
    return transformer


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("text-to-image", "pixart-alpha"): build_pixart_alpha,
    ("text-to-image", "pixart-sigma"): build_pixart_sigma,
    ("text-to-image", "stable-diffusion-3"): build_stable_diffusion_3,
    ("text-to-image", "flux"): build_flux,
    ("text-to-image", "sana"): build_sana,
    ("text-to-image", "qwen-image"): build_qwen_image,
    ("text-to-image", "z-image"): build_z_image,
    ("image-to-image", "stable-diffusion-3"): build_stable_diffusion_3,
    ("image-to-image", "flux"): build_flux,
}
