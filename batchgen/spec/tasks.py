"""The tasks of latent diffusion: what a row carries for each, and which settings it takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.errors import nearest


@dataclass(frozen=True)
class Task:
    """One thing that can be asked of a latent diffusion model.

    Attributes:
        name: as in a spec's ``task``.
        about: one sentence.
        needs: parts of ``input.columns`` that must be mapped.
        takes: further parts that may be.
        prompt_column: the column that holds the prompts if the spec names none.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    prompt_column: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part of ``input.columns`` that has a meaning here."""
        return (*self.needs, *self.takes)


def is_image(part: str) -> bool:
    """Whether a part of ``input.columns`` is an image; control images may bear a number."""
    return re.fullmatch(r"image|mask|control(_\d+)?", part) is not None


_ALWAYS = ("key", "label", "seed", "num_inference_steps", "scheduler", "eta")
_GUIDED = (*_ALWAYS, "guidance_scale")
_TEXT = (*_GUIDED, "negative_prompt", "lora")
_SIZED = ("width", "height")

TASKS = (
    Task(
        "unconditional",
        "images of what the model was trained on, from noise alone",
        needs=(),
        takes=(*_ALWAYS, *_SIZED),
    ),
    Task(
        "class-conditional",
        "images of a class, given by its number or its name",
        needs=("class_label",),
        takes=(*_GUIDED, *_SIZED),
    ),
    Task(
        "text-to-image",
        "images of a prompt",
        needs=("prompt",),
        takes=(*_TEXT, *_SIZED),
        prompt_column="prompt",
    ),
    Task(
        "image-to-image",
        "variations of an image that follow a prompt, as far from it as strength says",
        needs=("image",),
        takes=("prompt", *_TEXT, *_SIZED, "strength"),
        prompt_column="prompt",
    ),
    Task(
        "inpainting",
        "an image repainted where its mask is white",
        needs=("image", "mask"),
        takes=("prompt", *_TEXT, *_SIZED, "strength"),
        prompt_column="prompt",
    ),
    Task(
        "super-resolution",
        "a larger image of a small one",
        needs=("image",),
        takes=("prompt", *_TEXT, *_SIZED, "noise_level"),
    ),
    Task(
        "image-edit",
        "an image changed as an instruction says; colourisation, with a grey image as condition",
        needs=("image", "prompt"),
        takes=(*_TEXT, *_SIZED, "image_guidance_scale"),
        prompt_column="prompt",
    ),
    Task(
        "control",
        "images of a prompt that keep to a layout, a semantic map, edges, depth or a pose",
        needs=("prompt",),
        takes=(
            *("control", "image", "regions"),
            *_TEXT,
            *_SIZED,
            *("control_scale", "strength"),
        ),
        prompt_column="prompt",
    ),
    Task(
        "variation",
        "images that resemble an image: the image itself is the prompt",
        needs=("image",),
        takes=("prompt", *_TEXT, *_SIZED, "noise_level", "image_prompt_scale"),
    ),
)
MAX_LORA_WEIGHT = 10
TASK_NAMES = tuple(task.name for task in TASKS)


def task_named(name: str) -> Task:
    """The task of that name. Raises KeyError if there is none."""
    return {task.name: task for task in TASKS}[name]


def parse_lora(text: str, known: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """``name:weight,name:weight`` as (name, weight) by name; a name alone has its known weight.

    An empty text stands for no LoRA.

    Raises:
        ValueError: the message says what is allowed.
    """
    chosen: dict[str, float] = {}
    for entry in text.split(",") if text.strip() else ():
        name, colon, weight = (piece.strip() for piece in entry.partition(":"))
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(f"names of model.loras ({names}{nearest(name, known)}); got {name!r}")
        if name in chosen:
            raise ValueError(f"each LoRA once; {name} stands there twice")
        try:
            chosen[name] = float(weight) if colon else known[name]
        except ValueError:
            chosen[name] = math.nan
        if not abs(chosen[name]) <= MAX_LORA_WEIGHT:
            limit = f"-{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}"
            raise ValueError(f"`name:weight` with a weight of {limit}; got {entry.strip()!r}")
    return tuple(sorted(chosen.items()))
