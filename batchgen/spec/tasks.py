"""The tasks of latent diffusion: the columns that each needs, and the settings that it supports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.errors import nearest

# Parts that every task takes, and carries to the output with the pixels.
LABEL_PARTS = ("objects", "label_mask", "new_category", "image_width", "image_height")
FOLLOWING = ("objects", "label_mask")  # those that are rewritten with the pixels


@dataclass(frozen=True)
class Task:
    """One task of a latent diffusion model.

    Attributes:
        name: as in a spec's ``task``.
        about: what it generates, in one phrase.
        needs: parts of ``input.columns`` that must have a column.
        takes: further parts that may have one.
        prompt_column: the column of the prompts, if the spec names none.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    prompt_column: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part of ``input.columns`` that this task uses."""
        return (*self.needs, *self.takes, *LABEL_PARTS)


def is_image(part: str) -> bool:
    """Whether a part of ``input.columns`` is an image; control images may have a number."""
    return re.fullmatch(r"image|mask|control(_\d+)?", part) is not None


def is_rewritten(part: str) -> bool:
    """Whether a part's column is not copied to the output: an image, or labels on its pixels."""
    return is_image(part) or part in FOLLOWING


_ALWAYS = ("key", "label", "split", "seed", "num_inference_steps", "scheduler", "eta")
_GUIDED = (*_ALWAYS, "guidance_scale")
_BY_TEXT = (*_GUIDED, "negative_prompt", "lora")
_SIZED = ("width", "height")

TASKS = (
    Task(
        "unconditional",
        "images like those that the model was trained on, from noise only",
        needs=(),
        takes=(*_ALWAYS, *_SIZED),
    ),
    Task(
        "class-conditional",
        "images of a class, given by its number or name",
        needs=("class_label",),
        takes=(*_GUIDED, *_SIZED),
    ),
    Task(
        "text-to-image",
        "images of a prompt",
        needs=("prompt",),
        takes=(*_BY_TEXT, *_SIZED),
        prompt_column="prompt",
    ),
    Task(
        "image-to-image",
        "variations of an image that follow a prompt; strength says how much may change",
        needs=("image",),
        takes=("prompt", *_BY_TEXT, *_SIZED, "strength"),
        prompt_column="prompt",
    ),
    Task(
        "inpainting",
        "an image repainted where its mask is white",
        needs=("image", "mask"),
        takes=("prompt", *_BY_TEXT, *_SIZED, "strength"),
        prompt_column="prompt",
    ),
    Task(
        "super-resolution",
        "a larger image of a small one",
        needs=("image",),
        takes=("prompt", *_BY_TEXT, *_SIZED, "noise_level"),
    ),
    Task(
        "image-edit",
        "an image changed by an instruction; also colourisation of a grey image",
        needs=("image", "prompt"),
        takes=(*_BY_TEXT, *_SIZED, "image_guidance_scale"),
        prompt_column="prompt",
    ),
    Task(
        "control",
        "images of a prompt that follow a layout, a semantic map, edges, depth or a pose",
        needs=("prompt",),
        takes=(
            *("control", "image", "regions"),
            *_BY_TEXT,
            *_SIZED,
            *("control_scale", "strength"),
        ),
        prompt_column="prompt",
    ),
    Task(
        "variation",
        "images that resemble an image, which is used as the prompt",
        needs=("image",),
        takes=("prompt", *_BY_TEXT, *_SIZED, "noise_level", "image_prompt_scale"),
    ),
)
MAX_LORA_WEIGHT = 10
TASK_NAMES = tuple(task.name for task in TASKS)


def task_named(name: str) -> Task:
    """Return the task of that name; KeyError if there is none."""
    return {task.name: task for task in TASKS}[name]


def parse_lora(text: str, known: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Parse ``name:weight,name:weight`` into (name, weight) pairs, sorted by name.

    A name without a weight gets its weight in ``known``. An empty text means no LoRA.

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
            raise ValueError(f"each LoRA once; {name} is named twice")
        try:
            chosen[name] = float(weight) if colon else known[name]
        except ValueError:
            chosen[name] = math.nan
        if not abs(chosen[name]) <= MAX_LORA_WEIGHT:
            limit = f"-{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}"
            raise ValueError(f"`name:weight` with a weight of {limit}; got {entry.strip()!r}")
    return tuple(sorted(chosen.items()))
