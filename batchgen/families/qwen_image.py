"""Qwen-Image: text-to-image with a Qwen2.5-VL as text encoder.

Without a negative prompt the library would not guide at all, whatever the scale. Here a scale above
1 always guides, against the prompt of one blank that its documentation names for that case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_by, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

TOKENS = 512  # what the denoiser attends to of a prompt and of what closes it
LENGTH = TOKENS + 8  # the mask is never all ones: the pipeline would drop it, but not in each batch
LONGEST = 1024  # lets LENGTH pass


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` (1, T, D) and ``prompt_embeds_mask`` (1, T): zeros after the prompt."""
    import torch
    from torch.nn.functional import pad

    text = prompt or " " if negative else prompt
    embeds, _ = pipeline.encode_prompt(text, pipeline.device, max_sequence_length=TOKENS)
    count = embeds.shape[1]
    mask = torch.ones(1, count, dtype=torch.int64, device=embeds.device)
    return {
        "prompt_embeds": pad(embeds, (0, 0, 0, LENGTH - count)),
        "prompt_embeds_mask": pad(mask, (0, LENGTH - count)),
    }


def denoise(pipeline: Any, given: Given) -> torch.Tensor:
    """(B, h/2 * w/2, 4 * C): the latents packed two by two, as the pipeline leaves them."""
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
    """The VAE is one of video: its latents have a mean and a spread, and one frame is made."""
    import torch

    vae = pipeline.vae
    unpacked = pipeline._unpack_latents(
        latents, call.height, call.width, pipeline.vae_scale_factor
    ).to(vae.dtype)  # (B, C, 1, h, w)

    mean, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # Divided by the inverse, as the pipeline does it, to the last bit.
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
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=denoise,
            decode=decode,
            tokenizers=(("tokenizer", TOKENS),),
        ),
        split=(
            "by public arguments: prompt_embeds, filled up to one length, and their mask in, packed"
            " latents out"
        ),
        size=128,
        channels=((4, 0),),
        multiple_of=2,
        recommended=(50, 4.0),
    ),
)
