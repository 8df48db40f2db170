"""Z-Image: text-to-image with a Qwen3 as text encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchgen.families.adapter import Adapter, Given
from batchgen.families.calls import call_pipeline, decode_scaled, device_of, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import torch

    from batchgen.families.adapter import Tensors

TOKENS = 512
HEAD = 3  # tokens that the chat template adds before a prompt
STEP = 32  # the transformer pads a prompt to a multiple of this many tokens, and attends to all


def guided(call: Call) -> bool:
    """Whether guidance is on. Here a scale of 0 is off, since the pipeline adds 1 to it."""
    return call.guidance_scale > 0


def encode_prompt(pipeline: Any, prompt: str, negative: bool) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D), zero-padded, and the prompt's ``length`` (1,)."""
    import torch
    from torch.nn.functional import pad

    (embeds,), _ = pipeline.encode_prompt(prompt, device_of(pipeline), False)  # (length, D)
    return {
        "prompt_embeds": pad(embeds, (0, 0, 0, TOKENS - len(embeds)))[None],
        "length": torch.tensor([len(embeds)], device=embeds.device),
    }


def denoise(pipeline: Any, given: Given) -> torch.Tensor:
    """Return float32 latents (B, C, h, w).

    The pipeline uses an attention mask only if the prompts of a call differ in length, and then
    perhaps another kernel, which rounds differently. So there is one call for each length (in steps
    of 32 tokens) that occurs in the batch, always with B samples.
    """
    import torch

    latents: dict[int, torch.Tensor] = {}
    for rows in _rows_by_length(given):
        size = len(given.generators)
        spare = [torch.Generator("cpu").manual_seed(0) for _ in range(size - len(rows))]
        filled = rows + rows[:1] * len(spare)
        made = call_pipeline(
            pipeline,
            replace(given, prompts={}, negatives={}),
            **size_of(given.call),
            generator=[given.generators[row] for row in rows] + spare,
            prompt_embeds=_cut(given.prompts, filled),
            negative_prompt_embeds=_cut(given.negatives, filled) if given.negatives else None,
        )
        latents.update(zip(rows, made, strict=False))  # the spare ones are dropped
    return torch.stack([latents[row] for row in range(len(latents))])


def _rows_by_length(given: Given) -> list[list[int]]:
    lengths = [given.prompts["length"].tolist()]
    if given.negatives:
        lengths.append(given.negatives["length"].tolist())
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, pair in enumerate(zip(*lengths, strict=True)):
        groups.setdefault(tuple(-(-length // STEP) for length in pair), []).append(row)
    return list(groups.values())


def _cut(encoded: Tensors, rows: list[int]) -> list[torch.Tensor]:
    """Return each row's embeddings (length, D), the form that the pipeline takes."""
    return [encoded["prompt_embeds"][row, : int(encoded["length"][row])] for row in rows]


def decode(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    return decode_scaled(pipeline, latents.to(pipeline.vae.dtype), call)


FAMILIES = (
    Family(
        name="z-image",
        task="text-to-image",
        pipeline="ZImagePipeline",
        saved_as=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        encoder=("tokenizer", "text_encoder"),
        denoiser=("transformer", "scheduler"),
        decoder=("vae",),
        approximations=("tiny_vae",),
        adapter=Adapter(
            encode_prompt=encode_prompt,
            denoise=denoise,
            decode=decode,
            guided=guided,
            tokenizers=(("tokenizer", TOKENS - HEAD),),
        ),
        split=(
            "by public arguments: prompt_embeds in, latents out; one call of the pipeline for each"
            " length of prompt (in steps of 32 tokens) in a micro-batch"
        ),
        size=128,
        multiple_of=2,
        uncompiled="its tensors have another size for each length of the prompts",
        recommended=(50, 5.0),
    ),
)
