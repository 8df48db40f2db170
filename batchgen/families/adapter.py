"""How one diffusers pipeline is called, a stage at a time: functions and what they are given."""

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
        images: part (``image``, ``mask``, ``control``, ``control_1``, ...) -> n arrays, already at
            their planned size: uint8 RGB (height, width, 3), a mask uint8 (height, width) with 255
            where the image is to be repainted and 0 elsewhere. Variants of one row share the array
            object.
        generators: one CPU generator a sample, in its first state. What is drawn here is drawn in
            the order of the plain pipeline, since the denoise stage goes on from where it ends.
        batch_size: B, to which tensors are filled up where the plain pipeline encodes all images of
            a call at once.
    """

    call: Call
    images: Images
    generators: Sequence[torch.Generator]
    batch_size: int


@dataclass(frozen=True)
class Given:
    """What one call of the denoise stage is given, filled up with dummies to the batch size B.

    Attributes:
        call: the settings that the samples share.
        prompts: name -> (B, ...) what ``encode_prompt`` made of each sample's prompt, or
            ``encode_label`` of its class.
        negatives: the same names, of the negative prompts; empty without guidance.
        conditions: name -> (B, ...) what ``encode_images`` made.
        labels: B class numbers; empty where the task has no classes.
        generators: B CPU generators, which go on from where the encode stage left them.
    """

    call: Call
    prompts: Tensors
    negatives: Tensors
    conditions: Tensors
    labels: Sequence[int]
    generators: list[torch.Generator]


def is_guided(call: Call) -> bool:
    """Whether classifier-free guidance is on: as in diffusers, a scale of 1 is none."""
    return call.guidance_scale > 1


def never_guided(call: Call) -> bool:
    """The guidance scale is a number that the model reads: there is no negative prompt."""
    return False


@dataclass(frozen=True)
class Adapter:
    """The functions of one family. ``pipeline`` holds the stage's own components alone.

    Attributes:
        denoise: (pipeline, given) -> (B, ...) latents as the pipeline ends with them.
        decode: (pipeline, latents, call) -> (B, 3, height, width) in [-1, 1], as the VAE gives it.
        encode_prompt: (pipeline, prompt, negative) -> name -> (1, ...) tensors of one fixed shape,
            whatever the prompt; ``negative`` says that it is a negative prompt, of which an empty
            one means what the library makes of none. None: the task reads no prompt.
        encode_label: (pipeline, class number, or None for no class) -> name -> (1, ...) tensors,
            where classes are embedded instead of prompts.
        encode_images: (pipeline, inputs) -> name -> (n, ...) tensors, n samples in order. None: the
            task reads no image. Pixels that the pipeline wants as pixels stay uint8 (n, H, W, 3).
        guided: whether negative prompts are encoded for a call.
        tokenizers: (component, attribute or number of tokens read) of those that read the prompt;
            a prompt that none of them reads whole is recorded as truncated. A number of 0 stands
            for the tokenizer's ``model_max_length``.
        words: what the tokenizers are given of a prompt; None: the prompt as it is.
    """

    denoise: Callable[[Any, Given], torch.Tensor]
    decode: Callable[[Any, torch.Tensor, Call], torch.Tensor]
    encode_prompt: Callable[[Any, str, bool], Tensors] | None = None
    encode_label: Callable[[Any, int | None], Tensors] | None = None
    encode_images: Callable[[Any, ImageInputs], Tensors] | None = None
    guided: Callable[[Call], bool] = is_guided
    tokenizers: tuple[tuple[str, int], ...] = ()
    words: Callable[[str], str] | None = None
