"""Reads a complete model from one safetensors file, the format of the original Stable Diffusion.

Configurations, tokenizers and the scheduler, which are not in the file, are read from a folder in
diffusers layout. diffusers converts the names of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError
from batchgen.families import Family
from batchgen.families.diffusers_source import mixins_of
from batchgen.models.additions import Shapes, shapes_of
from batchgen.models.files import Component, need

NAME = "single_file.safetensors"  # its name in the manifest, whatever the file is called
_UNET = "model.diffusion_model."
_ATTENDING = ".attn2.to_k.weight"  # its number of columns is the width of the text embeddings
_TOKENS = "token_embedding.weight"
# Class of a component -> tensors of it, one of which the file must have.
_MARKS = {
    "UNet2DConditionModel": (f"{_UNET}input_blocks.0.0.weight",),
    "AutoencoderKL": ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
    "CLIPTextModel": (
        f"cond_stage_model.transformer.text_model.embeddings.{_TOKENS}",
        f"conditioner.embedders.0.transformer.text_model.embeddings.{_TOKENS}",
        f"cond_stage_model.model.{_TOKENS}",
    ),
    "CLIPTextModelWithProjection": (
        f"conditioner.embedders.1.model.{_TOKENS}",
        f"conditioner.embedders.0.model.{_TOKENS}",
    ),
}


def from_single_file(
    file: Path, folder: Path, family: Family, components: Sequence[Component]
) -> list[Component]:
    """Return the parts, with those of ``folder`` marked as without weights of their own.

    Raises:
        ModelError: the file lacks their weights or has those of another model, or diffusers cannot
            read such a file.
    """
    if not any(name.endswith("FromSingleFileMixin") for name in mixins_of(family.pipeline)):
        raise ModelError(
            f"model {file}: a {family.name} model for {family.task} ({family.pipeline}) cannot be"
            " read from a single file; needed: a folder in diffusers layout"
        )
    shapes = shapes_of("model", file)
    inside = [
        component
        for component in components
        if component.weighted and component.folder == folder / component.label
    ]
    for component in inside:
        _check(component, file, shapes)
    widths = [
        need(component, "hidden_size")
        for component in inside
        if component.class_name.startswith("CLIP")
    ]
    if len(set(widths)) < len(widths):
        raise ModelError(
            f"model {file}: both text encoders have the width {widths[0]}, but diffusers can only"
            " tell those of a single file apart by their width; needed: a folder in diffusers"
            " layout"
        )
    return [
        replace(component, weighted=False) if component in inside else component
        for component in components
    ]


def load_single_file(
    class_name: str, file: Path, folder: Path, dtype: Any, given: Mapping[str, Any]
) -> Any:
    """Load a pipeline from the file, with the ``given`` components (or None) as they are."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        pipeline = getattr(diffusers, class_name).from_single_file(
            str(file), config=str(folder), local_files_only=True, dtype=dtype, **given
        )
    except NotImplementedError as error:  # torch's error for parameters without values
        raise ModelError(
            f"model {file} lacks weights that the configurations of {folder} need; it belongs to "
            "another model, or is incomplete"
        ) from error
    except (SingleFileComponentError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        told = str(error).strip().partition("\n")[0][:300]
        raise ModelError(
            f"model {file} cannot be read with the configurations of {folder}: {told}"
        ) from error
    for name, component in pipeline.components.items():
        if given.get(name) is None and hasattr(component, "named_parameters"):
            _require_whole(name, component, file)
    return pipeline


def _check(component: Component, file: Path, shapes: Shapes) -> None:
    marks = _MARKS.get(component.class_name)
    if marks is None:
        raise ModelError(
            f"{component.name}: a {component.class_name} cannot be read from a single file; "
            f"allowed: {', '.join(_MARKS)}"
        )
    mark = next((key for key in marks if key in shapes), None)
    if mark is None:
        raise ModelError(
            f"{component.name}: {file} does not contain this component: it lacks "
            f"{' and '.join(marks)}"
        )
    attending = [key for key in shapes if key.startswith(_UNET) and key.endswith(_ATTENDING)]
    if component.class_name == "UNet2DConditionModel":
        wanted = {mark: [need(component, "block_out_channels")[0], need(component, "in_channels")]}
        attended = need(component, "cross_attention_dim")
        wanted |= {key: [shapes[key][0], attended] for key in attending}
    elif component.class_name == "AutoencoderKL":
        wanted = {
            mark: [need(component, "block_out_channels")[-1], need(component, "latent_channels")]
        }
    else:
        wanted = {mark: [need(component, "vocab_size"), need(component, "hidden_size")]}
    for key, sizes in wanted.items():
        if list(shapes[key][:2]) != sizes:
            raise ModelError(
                f"{component.name}: {component.folder} does not fit {file}: the shape of {key} is"
                f" {list(shapes[key][:2])}, but by the configuration it is {sizes}"
            )


def _require_whole(name: str, component: Any, file: Path) -> None:
    """Refuse a component with missing weights; diffusers leaves them without values, silently."""
    missing = [key for key, one in component.named_parameters() if one.is_meta]
    if missing:
        raise ModelError(
            f"model {file} lacks weights of {name}, such as {missing[0]}; it belongs to another"
            " model, or is incomplete"
        )
