"""Tiny models with seeded random weights, one for each family, for tests and first trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from batchgen.models.tiny import (
    control,
    ldm,
    stable_diffusion,
    stable_diffusion_xl,
    transformer,
    variation,
)

# (task, family) -> function that saves such a model in a folder and returns the folder
BUILDERS: dict[tuple[str, str], Callable[[Path], Path]] = {
    **stable_diffusion.BUILDERS,
    **stable_diffusion_xl.BUILDERS,
    **control.BUILDERS,
    **ldm.BUILDERS,
    **transformer.BUILDERS,
    **variation.BUILDERS,
}
