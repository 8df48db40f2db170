"""The catalogue of model families: for each task, the pipelines and how their calls are split.

Importing it loads no model library: functions that need torch import it when they run.
"""

from batchgen.families.adapter import Adapter, Given, ImageInputs, is_guided
from batchgen.families.control import FAMILIES as _CONTROL
from batchgen.families.family import Family
from batchgen.families.flux import FAMILIES as _FLUX
from batchgen.families.image_edit import FAMILIES as _IMAGE_EDIT
from batchgen.families.inpainting import FAMILIES as _INPAINTING
from batchgen.families.ldm import FAMILIES as _LDM
from batchgen.families.pixart import FAMILIES as _PIXART
from batchgen.families.qwen_image import FAMILIES as _QWEN_IMAGE
from batchgen.families.sana import FAMILIES as _SANA
from batchgen.families.stable_diffusion import FAMILIES as _STABLE_DIFFUSION
from batchgen.families.stable_diffusion_3 import FAMILIES as _STABLE_DIFFUSION_3
from batchgen.families.stable_diffusion_xl import FAMILIES as _STABLE_DIFFUSION_XL
from batchgen.families.stable_diffusion_xl_refiner import FAMILIES as _XL_REFINER
from batchgen.families.upscaling import FAMILIES as _UPSCALING
from batchgen.families.variation import FAMILIES as _VARIATION
from batchgen.families.z_image import FAMILIES as _Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    *_STABLE_DIFFUSION,
    *_INPAINTING,
    *_IMAGE_EDIT,
    *_UPSCALING,
    *_STABLE_DIFFUSION_XL,
    *_XL_REFINER,
    *_CONTROL,
    *_LDM,
    *_PIXART,
    *_STABLE_DIFFUSION_3,
    *_FLUX,
    *_SANA,
    *_QWEN_IMAGE,
    *_Z_IMAGE,
    *_VARIATION,
)


def family_named(task: str, name: str) -> Family:
    """Return the family of that name in a task; KeyError if there is none."""
    return {(family.task, family.name): family for family in FAMILIES}[task, name]


__all__ = ["FAMILIES", "Adapter", "Family", "Given", "ImageInputs", "family_named", "is_guided"]
