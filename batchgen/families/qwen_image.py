"""Qwen-Image: text-to-image with a Qwen2.5-VL as text encoder.

Without a negative prompt the library runs without guidance, at any scale. Here a scale above 1
always guides, against a prompt of one blank, as its documentation recommends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_by, device_of, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

TOKENS = 512  # tokens that the denoiser reads of a prompt and its closing marks
LENGTH = TOKENS + 8  # so that no mask is all ones: the pipeline drops such a mask, in some batches
LONGEST = 1024  # the pipeline's limit of tokens, above LENGTH


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D) and ``prompt_embeds_mask`` (1, T), zero-padded."""
    import torch
    from torch.nn.functional import pad

    text = prompt or " " if negative else prompt
    embeds, _ = pipeline.encode_prompt(text, device_of(pipeline), max_sequence_length=TOKENS)
    count = embeds.shape[1]
    mask = torch.ones(1, count, dtype=torch.int64, device=embeds.device)
    return {
        "prompt_embeds": pad(embeds, (0, 0, 0, LENGTH - count)),
        "prompt_embeds_mask": pad(mask, (0, LENGTH - count)),
    }


def denoise(pipeline: Any, given: Given) -> torch.Tensor:
    """Return (B, h/2 * w/2, 4 * C): latents in blocks of 2 x 2, the pipeline's packed form."""
    scale = given.call.guidance_scale
    distilled = pipeline.transformer.config.guidance_embeds
    return call_pipeline(
        pipeline,
        given,
        **size_of(given.call),
        guidance_scale=scale if distilled else None,
        true_cfg_scale=scale,
        max_sequence_length=LONGEST,
    )


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Undo mean and deviation of the latents, and decode one frame with the VAE, a video model."""
    import torch

    vae = pipeline.vae
    unpacked = pipeline._unpack_latents(
        latents, call.height, call.width, pipeline.vae_scale_factor
    ).to(vae.dtype)  # (B, C, 1, h, w)

    mean, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # Division by the inverse, as the pipeline does it, so that the bits are equal.
    plain = unpacked / (1.0 / spread).to(unpacked) + mean.to(unpacked)
    return decode_by(vae, plain)[:, :, 0]


FAMILIES = (
    Family(
        name="qwen-image",
        task="text-to-image",
        pipeline="QwenImagePipeline",
        saved_as=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
        encoder=("tokenizer", "text_encoder"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("mag_cache", "taylor_seer"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=denoise,
            decode=decode,
            tokenizers=(("tokenizer", TOKENS),),
        ),
        split=(
            "by public arguments: prompt_embeds, padded to one length, and their mask in, packed"
            " latents out"
        ),
        size=128,
        channels=((4, 0),),
        multiple_of=2,
        recommended=(50, 4.0),
    ),
)
