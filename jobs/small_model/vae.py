"""The autoencoder: 32x32 pictures to 8x8x4 latents of unit variance, and back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from jobs.small_model.data import LabelledImages, to_model_range
from jobs.small_model.loop import step_generator
from jobs.small_model.recipe import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, Recipe

ENCODE_BATCH = 64


def build_vae(recipe: Recipe) -> AutoencoderKL:
    """An AutoencoderKL with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # normalise_latents makes this true
        force_upcast=False,
        mid_block_add_attention=False,  # one object a picture: convolutions see enough
    )


def vae_loss(
    vae: AutoencoderKL, digits: LabelledImages, shapes: LabelledImages, recipe: Recipe, step: int
) -> torch.Tensor:
    """L1 + MSE + edge + KL of one batch; the edge term is what keeps shapes tellable apart."""
    generator = step_generator(recipe.seed + 1, step)
    x = to_model_range(_mixed_batch(digits, shapes, recipe, generator))  # (B, 3, 32, 32)
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(generator=generator)  # (B, 4, 8, 8)
    y = vae.decode(z).sample  # (B, 3, 32, 32)
    pixels = functional.l1_loss(y, x) + functional.mse_loss(y, x)
    edges = functional.l1_loss(y.diff(dim=-1), x.diff(dim=-1))
    edges = edges + functional.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    kl = posterior.kl().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)  # nats per latent value
    loss: torch.Tensor = pixels + recipe.edge_weight * edges + recipe.kl_weight * kl
    return loss


def _mixed_batch(
    digits: LabelledImages, shapes: LabelledImages, recipe: Recipe, generator: torch.Generator
) -> torch.Tensor:
    digit_count = round(recipe.vae.batch_size * recipe.digit_share)
    shape_count = recipe.vae.batch_size - digit_count
    i = torch.randint(len(digits), (digit_count,), generator=generator)  # (B_d,)
    j = torch.randint(len(shapes), (shape_count,), generator=generator)  # (B_s,)
    return torch.cat((digits.images[i], shapes.images[j]))  # (B, 3, 32, 32) uint8


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means of uint8 ``images`` (N, 3, 32, 32): float32 (N, 4, 8, 8)."""
    batches = [
        vae.encode(to_model_range(batch)).latent_dist.mean for batch in images.split(ENCODE_BATCH)
    ]
    return torch.cat(batches)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold per-channel mean and deviation over ``images`` into the two 1x1 convolutions.

    Afterwards every latent channel has zero mean and unit variance, so that one noise schedule
    suits all four, and ``scaling_factor`` is 1.
    """
    latents = encode_all(vae, images)  # (N, 4, 8, 8)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))  # (4,), (4,)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d) and isinstance(post, nn.Conv2d)
    assert quant.bias is not None and post.bias is not None
    # quant_conv gives means, then log variances: (2 * 4, 2 * 4, 1, 1).
    quant.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - mean) / std
    quant.bias[LATENT_CHANNELS:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean  # before the weight is scaled
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of ``images`` (N, 3, 32, 32) uint8 through the VAE."""
    x = to_model_range(images)  # (N, 3, 32, 32)
    y = vae.decode(encode_all(vae, images)).sample.clamp(-1, 1)  # (N, 3, 32, 32)
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))  # (N,), pixels in 0..1
    return float((-10 * mse.clamp_min(1e-10).log10()).mean())
