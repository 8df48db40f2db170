"""Defines an adapter: the functions that call one diffusers pipeline stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchgen.records import Call

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tensors = Mapping[str, torch.Tensor]
    Images = Mapping[str, Sequence[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class ImageInputs:
    """The conditioning images of one micro-batch of n samples.

    Attributes:
        call: the settings that the samples share.
        images: part (``image``, ``mask``, ``control``, ``control_1``, ...) -> n arrays in their
            planned size: uint8 RGB (height, width, 3), or a mask uint8 (height, width) with 255
            where the image is repainted and 0 elsewhere. Variants of one row share the array
            object.
        generators: one CPU generator for each sample, in its first state. Draws must have the
            order of the plain pipeline, since the denoise stage continues from the last state.
        batch_size: B, to which tensors are padded if the plain pipeline encodes all images of a
            call at once.
    """

    call: Call
    images: Images
    generators: Sequence[torch.Generator]
    batch_size: int


@dataclass(frozen=True)
class Given:
    """The inputs of one call of the denoise stage, padded with dummy samples to the batch size B.

    Attributes:
        call: the settings that the samples share.
        prompts: name -> (B, ...) tensors from ``encode_prompt``, or ``encode_label``.
        negatives: the same names, for the negative prompts; empty without guidance.
        conditions: name -> (B, ...) tensors from ``encode_images``.
        labels: B class numbers; empty if the task has no classes.
        generators: B CPU generators, in the state in which the encode stage left them.
    """

    call: Call
    prompts: Tensors
    negatives: Tensors
    conditions: Tensors
    labels: Sequence[int]
    generators: list[torch.Generator]


def is_guided(call: Call) -> bool:
    """Whether classifier-free guidance is on. As in diffusers, a scale of 1 or less is off."""
    return call.guidance_scale > 1


def never_guided(call: Call) -> bool:
    """For models that read the guidance scale as a number: there is no negative prompt."""
    return False


@dataclass(frozen=True)
class Adapter:
    """The functions of one family. ``pipeline`` has only the components of the current stage.

    Attributes:
        denoise: (pipeline, given) -> (B, ...) the final latents of the pipeline.
        decode: (pipeline, latents, call) -> (B, 3, height, width) in [-1, 1], the VAE's output.
        encode_prompt: (pipeline, prompt, negative) -> name -> (1, ...) tensors, whose shapes do not
            depend on the prompt. ``negative``: it is a negative prompt; an empty one is encoded as
            the library encodes a missing one. None: the task reads no prompt.
        encode_label: (pipeline, class number, or None for no class) -> name -> (1, ...) tensors,
            for models that embed classes instead of prompts.
        prompt_settings: settings of the call that ``encode_prompt`` (or ``encode_label``) takes as
            keyword arguments. Prompts are encoded once for each combination of their values.
        encode_images: (pipeline, inputs) -> name -> (n, ...) tensors, n samples in order. None: the
            task reads no image. Images that the pipeline reads as pixels stay uint8 (n, H, W, 3).
        guided: whether negative prompts are encoded for a call.
        tokenizers: (component, number of tokens it reads) of the tokenizers that read the prompt; a
            prompt that none of them reads completely is recorded as truncated. 0 stands for the
            tokenizer's ``model_max_length``.
        words: returns the part of a prompt that the tokenizers get; None: the complete prompt.
    """

    denoise: Callable[[Any, Given], torch.Tensor]
    decode: Callable[[Any, torch.Tensor, Call], torch.Tensor]
    encode_prompt: Callable[..., Tensors] | None = None
    encode_label: Callable[..., Tensors] | None = None
    prompt_settings: tuple[str, ...] = ()
    encode_images: Callable[[Any, ImageInputs], Tensors] | None = None
    guided: Callable[[Call], bool] = is_guided
    tokenizers: tuple[tuple[str, int], ...] = ()
    words: Callable[[str], str] | None = None
