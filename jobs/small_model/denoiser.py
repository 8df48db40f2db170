"""The U-Net and its text encoder, trained together on the VAE's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jobs.small_model.captions import digit_captions, shape_captions
from jobs.small_model.loop import step_generator
from jobs.small_model.recipe import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS, Recipe

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class LatentPool:
    """Encoded pictures with their labels: ``latents`` (N, 4, 8, 8), ``labels`` (N, K) int64."""

    latents: torch.Tensor
    labels: torch.Tensor


class Denoiser(nn.Module):
    """The two networks the second stage trains, as one module: ``v = f(z_t, t, tokens)``."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, z: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted velocity (B, 4, 8, 8) for noisy ``z`` at steps ``t`` (B,), tokens (B, L)."""
        states = self.text_encoder(tokens).last_hidden_state  # (B, L, D)
        velocity: torch.Tensor = self.unet(z, t, states).sample  # (B, 4, 8, 8)
        return velocity


def build_denoiser(recipe: Recipe, tokenizer: CLIPTokenizer) -> Denoiser:
    """The networks with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed + 4)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Denoiser(unet, CLIPTextModel(config))


def noise_schedule() -> DDPMScheduler:
    """Stable Diffusion's schedule, rescaled to end in pure noise (Lin et al. 2023)."""
    return DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect on trailing steps; the pipeline warns of any other value
        clip_sample=False,
    )


def sampler() -> DPMSolverMultistepScheduler:
    """The scheduler that ships: DPM-Solver++ of order 2 over the same schedule."""
    schedule = noise_schedule()
    return DPMSolverMultistepScheduler.from_config(
        schedule.config, algorithm_type="dpmsolver++", solver_order=2
    )


def denoiser_loss(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    schedule: DDPMScheduler,
    digits: LatentPool,
    shapes: LatentPool,
    recipe: Recipe,
    step: int,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity over one batch of digits and shapes."""
    generator = step_generator(recipe.seed + 5, step)
    count = recipe.denoiser.batch_size
    digit_count = round(count * recipe.digit_share)
    i = torch.randint(len(digits.labels), (digit_count,), generator=generator)  # (B_d,)
    j = torch.randint(len(shapes.labels), (count - digit_count,), generator=generator)  # (B_s,)
    z = torch.cat((digits.latents[i], shapes.latents[j]))  # (B, 4, 8, 8)
    captions = digit_captions(digits.labels[i], generator)
    captions += shape_captions(shapes.labels[j], generator)
    dropped = torch.rand(count, generator=generator) < recipe.caption_dropout  # (B,)
    captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
    tokens = tokenize(tokenizer, captions)  # (B, L)
    return velocity_loss(lambda noisy, t: model(noisy, t, tokens), schedule, z, generator)


def velocity_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    schedule: DDPMScheduler,
    z: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of ``predict(noisy, t)`` for latents ``z`` (B, 4, 8, 8)."""
    noise = torch.randn(z.shape, generator=generator)  # (B, 4, 8, 8)
    t = _spread_timesteps(len(z), generator)  # (B,)
    noisy = schedule.add_noise(z, noise, t)  # (B, 4, 8, 8)
    target = schedule.get_velocity(z, noise, t)  # (B, 4, 8, 8)
    return functional.mse_loss(predict(noisy, t), target)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, L) int64, padded to the model's length as the pipeline pads them."""
    encoded = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: torch.Tensor = encoded.input_ids
    return ids


def _spread_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep from each of ``count`` equal strata, shuffled: a quieter loss than i.i.d."""
    strata = torch.randperm(count, generator=generator)  # (B,)
    offsets = torch.rand(count, generator=generator)  # (B,)
    return ((strata + offsets) / count * TRAIN_TIMESTEPS).long().clamp_max(TRAIN_TIMESTEPS - 1)
