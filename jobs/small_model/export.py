"""Turn a training run's checkpoints into a model directory that diffusers opens by itself."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from jobs.small_model.card import CARD_FILE, SPLIT_FILE, first_card, write_readme
from jobs.small_model.data import digit_images, digit_split, drawn_shapes
from jobs.small_model.denoiser import build_denoiser, sampler
from jobs.small_model.loop import load_averaged
from jobs.small_model.tokenizer import build_tokenizer, save_tokenizer
from jobs.small_model.train import (
    DENOISER_FILE,
    VAE_FILE,
    normalising_images,
    read_recipe,
    training_images,
)
from jobs.small_model.vae import build_vae, normalise_latents, reconstruction_psnr

HELD_OUT_SEED = 3_000
SETTINGS_FILE = "batchgen.json"  # where batchgen looks for a model's own defaults


def export(out: Path, target: Path) -> None:
    """Write the run in ``out`` to ``target`` as half-precision safetensors, all or nothing.

    Raises FileNotFoundError where a stage has no checkpoint yet. A directory already at
    ``target`` is replaced.
    """
    recipe = read_recipe(out)
    vae = build_vae(recipe)
    vae_steps, vae_cpu_s = load_averaged(out / VAE_FILE, vae)
    digits, shapes = training_images(recipe)
    normalise_latents(vae.eval().requires_grad_(False), normalising_images(digits, shapes))
    tokenizer = build_tokenizer()
    denoiser = build_denoiser(recipe, tokenizer)
    steps, cpu_s = load_averaged(out / DENOISER_FILE, denoiser)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=denoiser.unet.eval(),
        scheduler=sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    card = first_card(
        recipe,
        {
            "vae_steps": vae_steps,
            "denoiser_steps": steps,
            "vae_cpu_s": round(vae_cpu_s),
            "denoiser_cpu_s": round(cpu_s),
            "torch": torch.__version__,
        },
        _held_out_psnr_db(vae),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed, so that a reader never sees half a model.
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_model(pipeline, staging)
        (staging / SPLIT_FILE).write_text(json.dumps(digit_split().to_dict()) + "\n")
        (staging / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
        (staging / SETTINGS_FILE).write_text(json.dumps(card["recommended"], indent=2) + "\n")
        write_readme(staging)
        staging.chmod(0o755)
        swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_model(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """Save ``pipeline`` in diffusers layout with float16 weights."""
    for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        for parameter in network.parameters():
            parameter.data = parameter.data.half()
    pipeline.save_pretrained(directory, safe_serialization=True)
    save_tokenizer(pipeline.tokenizer, directory / "tokenizer")
    # Left at float16, transformers would load this half of the pipeline as float16 and diffusers
    # the other half as float32, and a caller who names no dtype would get a pipeline that fails.
    path = directory / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    for weights in directory.rglob("*.safetensors"):
        weights.chmod(0o644)


def _held_out_psnr_db(vae: AutoencoderKL) -> dict[str, float]:
    unseen = {
        "digits": digit_images(digit_split().test).images,
        "shapes": drawn_shapes(500, HELD_OUT_SEED).images,
    }
    return {name: round(reconstruction_psnr(vae, images), 1) for name, images in unseen.items()}


def swap(staging: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / target.name)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)
