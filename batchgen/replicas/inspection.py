"""What a model is, read from its files alone: that it is whole and fits the task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError
from batchgen.replicas.families import (
    WEIGHT_STEMS,
    Family,
    check_scheduler,
    family_of,
    weight_globs,
)
from batchgen.replicas.find import RECOMMENDED_FILE, TEXT_FILES, find
from batchgen.spec import Model

UNSAFE_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
RECOMMENDED_STEPS = 25
RECOMMENDED_GUIDANCE = 7.5


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it; goes into the plan.

    Attributes:
        model_id: the name, folder or hub id as the user gave it.
        path: the local folder it was found in.
        revision: the hub's commit, or ``sha256:`` and the head of ``manifest_sha256``.
        manifest_sha256: over name, size and SHA-256 of every file that would be loaded.
        pipeline_class: the diffusers class the folder was saved from.
        scheduler: class name of the scheduler in effect.
        latent_channels: C of the latents (C, height / f, width / f).
        vae_scale_factor: f.
        width: the U-Net's native width in pixels.
        height: the U-Net's native height in pixels.
        num_inference_steps: the model's own recommendation, or 25.
        guidance_scale: the model's own recommendation, or 7.5.
    """

    model_id: str
    path: str
    revision: str
    manifest_sha256: str
    pipeline_class: str
    scheduler: str
    latent_channels: int
    vae_scale_factor: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


def inspect(model: Model, task: str) -> ModelInfo:
    """Find a model and check that it can serve the task, without importing torch.

    A name in ``batchgen/models`` is looked for first, then a local folder, then the Hugging Face
    hub (its cache alone where ``HF_HUB_OFFLINE`` is set). Reads every file once, for its hash.

    Raises:
        ModelError: not found or not cached; no pipeline, component, weights or scheduler that can
            be used. The message names the component and the file.
    """
    folder, commit = find(model, task)
    index = pipeline_index(folder)
    family = family_of(index.get("_class_name"), task, str(folder))
    files = _files(folder, index, family, model.variant)
    _check_fit(folder, family, task)
    manifest = _manifest_sha256(folder, files)
    factor = 2 ** (len(_need(folder, "vae", "block_out_channels")) - 1)
    height, width = _native_size(folder)
    steps, guidance = _recommended(folder)
    return ModelInfo(
        model_id=model.path,
        path=str(folder),
        revision=commit or f"sha256:{manifest[:12]}",
        manifest_sha256=manifest,
        pipeline_class=index["_class_name"],
        scheduler=check_scheduler(model.scheduler or index["scheduler"][1]),
        latent_channels=_need(folder, "vae", "latent_channels"),
        vae_scale_factor=factor,
        width=width * factor,
        height=height * factor,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )


def pipeline_index(folder: Path) -> dict[str, Any]:
    """The content of ``model_index.json``.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(
            f"model folder {folder} has no model_index.json; allowed: a folder in diffusers layout,"
            " as save_pretrained writes it"
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model file {path} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"model file {path}: expected a JSON object")
    return tree


def _config(folder: Path, component: str, name: str = "config.json") -> dict[str, Any]:
    path = folder / component / name
    if not path.is_file():
        raise ModelError(f"{component}: the file {path} is missing")
    return _read_json(path)


def _need(folder: Path, component: str, key: str) -> Any:
    value = _config(folder, component).get(key)
    if value is None:
        raise ModelError(f"{component}: {folder / component / 'config.json'} has no {key!r}")
    return value


def _files(
    folder: Path, index: Mapping[str, Any], family: Family, variant: str | None
) -> list[Path]:
    """Every file that would be loaded; each component is checked on the way."""
    files = [folder / "model_index.json", folder / RECOMMENDED_FILE]
    for component in family.components:
        _check_entry(folder, index, component)
        inside = (folder / component).iterdir()
        files += [path for path in inside if path.suffix in TEXT_FILES]
    for component, name in family.others.items():
        _config(folder, component, name)
    for component in family.weighted:
        _config(folder, component)
        files += _weights(folder / component, WEIGHT_STEMS[index[component][0]], variant)
    return sorted(path for path in files if path.is_file())


def _check_entry(folder: Path, index: Mapping[str, Any], component: str) -> None:
    entry = index.get(component)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
        raise ModelError(f"{component}: {folder / 'model_index.json'} names none")
    if entry[0] not in WEIGHT_STEMS:
        raise ModelError(
            f"{component}: {folder / 'model_index.json'} names {entry[0]}.{entry[1]}; allowed:"
            " classes of diffusers and transformers (code that comes with a model is never run)"
        )
    if not (folder / component).is_dir():
        raise ModelError(f"{component}: the folder {folder / component} is missing")


def _weights(component: Path, stem: str, variant: str | None) -> list[Path]:
    found = {path for glob in weight_globs(stem, variant) for path in component.glob(glob)}
    suffix = f".{variant}" if variant else ""
    parts = component / f"{stem}.safetensors.index{suffix}.json"
    if parts.is_file():
        found |= {component / name for name in _read_json(parts).get("weight_map", {}).values()}
    if not found:
        raise ModelError(_no_weights(component, stem, variant))
    for path in sorted(found):
        if not path.is_file() or path.stat().st_size == 0:
            raise ModelError(f"{component.name}: the weights {path} are missing or empty")
    return sorted(found)


def _no_weights(component: Path, stem: str, variant: str | None) -> str:
    wanted = component / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    message = f"{component.name}: the weights {wanted} are missing"
    present = sorted(path.name for path in component.iterdir())
    others = [name for name in present if name.endswith(".safetensors")]
    if others:
        return f"{message}; there are {', '.join(others)} (model.variant is {variant!r})"
    unsafe = [name for name in present if name.endswith(UNSAFE_WEIGHTS)]
    if unsafe:
        return f"{message}; {', '.join(unsafe)} cannot be used: allowed is safetensors alone"
    return message


def _check_fit(folder: Path, family: Family, task: str) -> None:
    """That the parts fit each other and the task, which loading them alone does not show."""
    channels = _need(folder, "vae", "latent_channels")
    taken = _need(folder, "unet", "in_channels")
    if taken != channels:
        raise ModelError(
            f"unet takes {taken} channels, the vae's latents have {channels}: a model for another"
            " task (inpainting, editing), or parts of two models"
        )
    if task == "image-to-image" and channels != family.image_latent_channels:
        allowed = family.image_latent_channels
        raise ModelError(f"vae has {channels} latent channels; allowed for {task}: {allowed}")
    _check_text(folder)


def _check_text(folder: Path) -> None:
    text, unet = _config(folder, "text_encoder"), _config(folder, "unet")
    given, taken = text.get("hidden_size"), unet.get("cross_attention_dim")
    if given is not None and taken is not None and given != taken:
        raise ModelError(f"unet attends to embeddings of width {taken}, text_encoder gives {given}")
    reads = text.get("max_position_embeddings")
    longest = _config(folder, "tokenizer", "tokenizer_config.json").get("model_max_length")
    if reads is not None and (longest is None or longest > reads):
        raise ModelError(
            f"tokenizer: {folder / 'tokenizer' / 'tokenizer_config.json'} has model_max_length"
            f" {longest}, the text_encoder reads {reads} tokens"
        )


def _native_size(folder: Path) -> tuple[int, int]:
    """(height, width) of the latents that the U-Net was made for."""
    size = _need(folder, "unet", "sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _recommended(folder: Path) -> tuple[int, float]:
    path = folder / RECOMMENDED_FILE
    given = _read_json(path) if path.is_file() else {}
    steps = given.get("num_inference_steps", RECOMMENDED_STEPS)
    guidance = given.get("guidance_scale", RECOMMENDED_GUIDANCE)
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise ModelError(f"{path}: num_inference_steps is {steps!r}; allowed: 1 to 1000")
    if type(guidance) not in (int, float) or not 0 <= guidance <= 100:
        raise ModelError(f"{path}: guidance_scale is {guidance!r}; allowed: 0 to 100")
    return steps, float(guidance)


def _manifest_sha256(folder: Path, files: list[Path]) -> str:
    manifest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        manifest.update(f"{name}\x1f{path.stat().st_size}\x1f{digest}\n".encode())
    return manifest.hexdigest()
