"""Finds and checks adapter files: LoRAs, textual inversions, an IP-Adapter.

It loads no model library: the keys and shapes of a safetensors file are in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.families import Family
from batchgen.families.diffusers_source import mixins_of
from batchgen.models.files import Component, need
from batchgen.models.find import UNSAFE_WEIGHTS, find_added
from batchgen.spec.model import Added, IpAdapter, Model

Shapes = Mapping[str, tuple[int, ...]]
# The file to use if a folder has several and the spec names none.
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
TWO_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # of Stable Diffusion XL
NAMELESS_TOKENS = ("emb_params",)  # written by other programs instead of a token
FACE_ID = "it needs face embeddings, which batchgen does not compute"
# For each kind of IP-Adapter: a key that only this kind has, the first weight of the projection,
# and the field of the image encoder that this weight's width must equal.
IP_ADAPTER_KINDS = (
    ("proj.weight", "proj.weight", "projection_dim"),
    ("proj.3.weight", "proj.0.weight", "hidden_size"),  # full face
    ("latents", "proj_in.weight", "hidden_size"),  # Plus
)
MAX_HEADER_BYTES = 100_000_000


def added_files(model: Model, family: Family, components: Sequence[Component]) -> dict[str, Path]:
    """Check all adapter files of the model, and map their names in the manifest to the files.

    Raises:
        ModelError: a file is missing, is not safetensors, or does not fit; the message names the
            field.
    """
    files: dict[str, Path] = {}
    for number, lora in enumerate(model.loras):
        field = f"model.loras.{number}"
        _require_loader(family, field, "LoraLoaderMixin", "LoRA")
        file = added_file(field, lora)
        _check_lora(field, file)
        files[f"loras/{lora.name}/{file.name}"] = file
    for number, inversion in enumerate(model.textual_inversions):
        field = f"model.textual_inversions.{number}"
        _require_loader(family, field, "TextualInversionLoaderMixin", "textual inversion")
        file = added_file(field, inversion)
        _check_inversion(field, file, inversion.token, components)
        files[f"textual_inversions/{number}/{file.name}"] = file
    if model.ip_adapter is not None:
        file = ip_adapter_weights(model.ip_adapter)
        _check_ip_adapter(file, components)
        files[f"ip_adapter/{file.name}"] = file
    return files


def added_file(field: str, added: Added, subfolder: str = "") -> Path:
    """Return the one safetensors file that an adapter of the spec names."""
    wanted = f"{subfolder}/{added.weight_name or '*.safetensors'}".lstrip("/")
    found = find_added(added.path, added.revision, field, [wanted])
    if found.is_file():
        return _safe(field, found)
    folder = found / subfolder
    if added.weight_name is not None:
        return _safe(field, folder / added.weight_name)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    safe = [name for name in names if name.endswith(".safetensors")]
    usual = [name for name in safe if name in USUAL_NAMES]
    if len(safe) > 1 and len(usual) != 1:
        raise ModelError(
            f"{field}: {folder} has several files; name one with weight_name: {', '.join(safe)}"
        )
    if not safe:
        unsafe = [name for name in names if name.endswith(UNSAFE_WEIGHTS)]
        refused = f"; {', '.join(unsafe)} cannot be used" if unsafe else ""
        raise ModelError(
            f"{field}: {folder} has no safetensors file{refused}; only safetensors is allowed"
        )
    return _safe(field, folder / (usual or safe)[0])


def ip_adapter_weights(adapter: IpAdapter) -> Path:
    """Return the IP-Adapter's file."""
    return added_file("model.ip_adapter", adapter, adapter.subfolder)


def components_added(model: Model) -> dict[str, Path]:
    """Map components that an IP-Adapter provides, if the model has none, to their folder."""
    adapter = model.ip_adapter
    if adapter is None:
        return {}
    folder = adapter.image_encoder
    if "/" not in folder:
        folder = f"{adapter.subfolder}/{folder}".lstrip("/")
    patterns = [f"{folder}/{name}" for name in ("*.json", "model.safetensors")]
    root = find_added(adapter.path, adapter.revision, "model.ip_adapter", patterns)
    return {"image_encoder": (root.parent if root.is_file() else root) / folder}


def reads_hidden_states(weights: Path) -> bool:
    """Whether an IP-Adapter reads the image encoder's second to last layer (Plus, full face)."""
    return "image_proj.proj.weight" not in shapes_of("model.ip_adapter", weights)


def shapes_of(field: str, file: Path) -> Shapes:
    """Map the key of every tensor of a safetensors file to its shape, from the header.

    Raises:
        ModelError: the file is not a safetensors file.
    """
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError("its header has no valid length")
            header = json.loads(opened.read(size))
        return {name: tuple(one["shape"]) for name, one in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{field}: {file} is not a safetensors file: {error}") from error


def _safe(field: str, file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"{field}: the file {file} is missing")
    if file.suffix != ".safetensors":
        raise ModelError(f"{field}: {file} cannot be used; only safetensors is allowed")
    return file


def _require_loader(family: Family, field: str, mixin: str, what: str) -> None:
    if not any(name.endswith(mixin) for name in mixins_of(family.pipeline)):
        raise ModelError(
            f"{field}: a {family.name} model for {family.task} ({family.pipeline}) does not "
            f"support a {what}; remove it"
        )


def _check_lora(field: str, file: Path) -> None:
    keys = shapes_of(field, file)
    if not any("lora" in key or "lokr" in key for key in keys):
        raise ModelError(f"{field}: {file} is not a LoRA: {_some(keys)}")


def _check_inversion(
    field: str, file: Path, token: str | None, components: Sequence[Component]
) -> None:
    shapes = shapes_of(field, file)
    widths = {component.name: component.config.get("hidden_size") for component in components}
    if shapes.keys() == TWO_ENCODERS.keys():
        targets = {key: TWO_ENCODERS[key] for key in shapes}
    elif len(shapes) == 1:
        targets = dict.fromkeys(shapes, "text_encoder")
    else:
        raise ModelError(f"{field}: {file} is not a textual inversion: {_some(shapes)}")
    if token is None and (len(shapes) > 1 or next(iter(shapes)) in NAMELESS_TOKENS):
        raise ModelError(f"{field}: {file} does not name its token; set {field}.token")
    for key, encoder in targets.items():
        width = widths.get(encoder)
        if width is None:
            raise ModelError(f"{field}: {file} is for {encoder}, but this model has none")
        if not shapes[key] or shapes[key][-1] != width:
            raise ModelError(
                f"{field}: {file} has embeddings of shape {shapes[key]}, but those of {encoder} "
                f"have the width {width}; it was trained for another model"
            )


def _check_ip_adapter(file: Path, components: Sequence[Component]) -> None:
    """Check the widths: image encoder to IP-Adapter, and IP-Adapter to U-Net."""
    field = "model.ip_adapter"
    whole = shapes_of(field, file)
    shapes = {key.removeprefix("image_proj."): shape for key, shape in whole.items()}
    layers = [key for key in whole if key.startswith("ip_adapter.")]
    if not layers or len(shapes) == len(layers):
        raise ModelError(f"{field}: {file} is not an IP-Adapter: {_some(whole)}")
    encoder = next(component for component in components if component.name == "image_encoder")
    attended = need(
        next(component for component in components if component.name == "unet"),
        "cross_attention_dim",
    )
    for key, first, given in IP_ADAPTER_KINDS:
        if key in shapes and first in shapes:
            taken, width = shapes[first][-1], need(encoder, given)
            break
    else:
        raise ModelError(f"{field}: {file} cannot be used: {FACE_ID}")
    if taken != width:
        raise ModelError(
            f"{field}: {file} takes image embeddings of width {taken}, but the image encoder"
            f" {encoder.folder} gives {width}; it was trained for another image encoder"
        )
    width = whole[layers[0]][-1]
    if width != attended:
        raise ModelError(
            f"{field}: {file} gives embeddings of width {width}, but the unet takes {attended}; it"
            " was trained for another model"
        )


def _some(keys: Shapes) -> str:
    return f"it has {', '.join(sorted(keys)[:3]) or 'no tensors'}{', ...' if len(keys) > 3 else ''}"
