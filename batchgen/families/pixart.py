"""PixArt-alpha and PixArt-sigma: text-to-image.

Prompts are lower-cased and stripped, as the library does. Links, file names and the like are never
removed (``clean_caption``), since that needs packages that may not be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return T5's ``prompt_embeds`` (1, T, D) and ``prompt_attention_mask`` (1, T)."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, device=device_of(pipeline), clean_caption=False
    )
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def denoise(pipeline: Any, given: Given) -> torch.Tensor:
    return call_pipeline(
        pipeline,
        given,
        **size_of(given.call),
        negative_prompt=None,  # its default is "", which excludes negative_prompt_embeds
        eta=given.call.eta,
        clean_caption=False,
        use_resolution_binning=False,
    )


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    return decode_scaled(pipeline, latents.to(pipeline.vae.dtype), call)


def _family(name: str, pipeline: str, tokens: int) -> Family:
    return Family(
        name=name,
        task="text-to-image",
        pipeline=pipeline,
        saved_as=(pipeline,),
        encoder=("tokenizer", "text_encoder"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=denoise,
            decode=decode,
            tokenizers=(("tokenizer", tokens),),
        ),
        split="by public arguments: prompt_embeds and their mask in, latents out",
        size=("transformer", "sample_size"),
        settings=("eta",),
        multiple_of=2,
        recommended=(20, 4.5),
    )


FAMILIES = (
    _family("pixart-alpha", "PixArtAlphaPipeline", ALPHA_TOKENS),
    _family("pixart-sigma", "PixArtSigmaPipeline", SIGMA_TOKENS),
)
