"""Tiny models of the Stable Diffusion 1 and 2 line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.models.tiny.parts import (
    HIDDEN,
    SIZE,
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    unet,
)

FACTOR = 4  # pixels per latent, each way
NO_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
EMBEDDED_NOISE = 128  # width of the latent upscaler's embedding of the noise level


def build_stable_diffusion(folder: Path) -> Path:
    """A text-to-image model, which also does image-to-image and inpainting."""
    from diffusers import StableDiffusionPipeline

    with seeded():
        return _saved(StableDiffusionPipeline(**_parts(folder), **NO_CHECKER), folder)


def build_consistency(folder: Path) -> Path:
    """A latent consistency model: its U-Net reads the guidance scale."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    with seeded():
        parts = _parts(folder, time_cond_proj_dim=32)
        parts["scheduler"] = LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        return _saved(LatentConsistencyModelPipeline(**parts, **NO_CHECKER), folder)


def build_inpainting(folder: Path) -> Path:
    """A model whose U-Net reads the mask and the masked image in addition to the latents."""
    from diffusers import StableDiffusionInpaintPipeline

    with seeded():
        parts = _parts(folder, in_channels=9)
        return _saved(StableDiffusionInpaintPipeline(**parts, **NO_CHECKER), folder)


def build_edit(folder: Path) -> Path:
    """An InstructPix2Pix model: its U-Net reads the image's latents in addition to its own."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    with seeded():
        parts = _parts(folder, in_channels=8)
        return _saved(StableDiffusionInstructPix2PixPipeline(**parts, **NO_CHECKER), folder)


def build_depth(folder: Path) -> Path:
    """A depth-to-image model with its depth estimator."""
    from diffusers import StableDiffusionDepth2ImgPipeline
    from transformers import DPTForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    with seeded():
        pipeline = StableDiffusionDepth2ImgPipeline(
            **_parts(folder, in_channels=5),
            depth_estimator=DPTForDepthEstimation(_depth_config()),
            feature_extractor=DPTImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        )
        return _saved(pipeline, folder)


def build_upscaler(folder: Path) -> Path:
    """An x4 upscaler: its U-Net reads the small image and its noise level."""
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    with seeded():
        parts = _parts(folder, in_channels=7, num_class_embeds=400)
        parts["vae"] = autoencoder(FACTOR, scaling_factor=0.08333)
        pipeline = StableDiffusionUpscalePipeline(
            **parts, low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        )
        return _saved(pipeline, folder)


def build_latent_upscaler(folder: Path) -> Path:
    """A latent upscaler (x2), to images of twice the tiny size, with Karras' noise schedule."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionLatentUpscalePipeline

    with seeded():
        parts = _parts(folder)
        parts["unet"] = unet(
            2 * SIZE // FACTOR,
            8,
            5,
            block_out_channels=(32, 64, 64),
            down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 2),
            up_block_types=(*("KCrossAttnUpBlock2D",) * 2, "KUpBlock2D"),
            mid_block_type=None,
            act_fn="gelu",
            attention_head_dim=8,
            norm_num_groups=None,
            conv_in_kernel=1,
            conv_out_kernel=1,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier",
            timestep_post_act="gelu",
            time_cond_proj_dim=EMBEDDED_NOISE + HIDDEN,
        )
        parts["scheduler"] = EulerDiscreteScheduler(prediction_type="sample")
        return _saved(StableDiffusionLatentUpscalePipeline(**parts), folder)


def _parts(folder: Path, in_channels: int = 4, **changes: Any) -> dict[str, Any]:
    """The components that all of these models have; ``changes`` are those of the U-Net."""
    from diffusers import PNDMScheduler

    tokenizer = clip_tokenizer(folder / "tokenizer")
    return {
        "vae": autoencoder(FACTOR),
        "text_encoder": clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(SIZE // FACTOR, in_channels, **changes),
        "scheduler": PNDMScheduler(
            skip_prk_steps=True, beta_schedule="scaled_linear", steps_offset=1
        ),
    }


def _depth_config() -> Any:
    from transformers import DPTConfig

    return DPTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    )


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("text-to-image", "stable-diffusion"): build_stable_diffusion,
    ("image-to-image", "stable-diffusion"): build_stable_diffusion,
    ("text-to-image", "latent-consistency"): build_consistency,
    ("image-to-image", "latent-consistency"): build_consistency,
    ("inpainting", "stable-diffusion"): build_inpainting,
    ("image-edit", "instruct-pix2pix"): build_edit,
    ("control", "depth-to-image"): build_depth,
    ("super-resolution", "stable-diffusion-x4"): build_upscaler,
    ("super-resolution", "latent-upscaler"): build_latent_upscaler,
}
