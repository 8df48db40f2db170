"""Reads and checks the files of model components: configurations, weights, and how they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from batchgen.errors import ModelError, shown
from batchgen.models.find import (
    PICKLED_STEMS,
    TEXT_FILES,
    UNSAFE_WEIGHTS,
    WEIGHT_STEMS,
    weight_globs,
)
from batchgen.spec.approximate import TINY_VAE
from batchgen.spec.model import Model

# Components whose class is in a module of diffusers are saved under that module's name.
# Module -> the library whose file names their weights have.
DIFFUSERS_MODULES = {"latent_diffusion": "transformers", "stable_diffusion": "diffusers"}
MOST = 1_000_000  # above the number of channels, sizes and classes of any model
MOST_BLOCKS = 16
OWN_CLASSES = ("ClassEmbedder",)  # those of ``models.own``


@dataclass(frozen=True)
class Component:
    """One component.

    Attributes:
        name: the component's name in the pipeline.
        label: its name in the manifest, with a number if there are several of that name.
        folder: the folder of its files.
        library: ``diffusers``, ``transformers`` or, for ``OWN_CLASSES``, ``batchgen``.
        class_name: the class that saved it.
        config: its configuration.
        weighted: whether it has weights.
    """

    name: str
    label: str
    folder: Path
    library: str
    class_name: str
    weighted: bool
    config: dict[str, Any] = field(repr=False)

    @staticmethod
    def from_index(pipeline: Path, name: str, entry: Any) -> Component:
        """Read the component of a pipeline's folder that ``model_index.json`` lists as ``name``."""
        index = pipeline / "model_index.json"
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            raise ModelError(f"{name}: {index} lists no such component")
        own = entry[0] == "batchgen" and entry[1] in OWN_CLASSES
        if not own and entry[0] not in ("diffusers", "transformers", *DIFFUSERS_MODULES):
            raise ModelError(
                f"{name}: {index} lists the class {entry[0]}.{entry[1]}; allowed: classes of "
                "diffusers and transformers (code that comes with a model is never run)"
            )
        if not (pipeline / name).is_dir():
            raise ModelError(f"{name}: the folder {pipeline / name} is missing")
        library = DIFFUSERS_MODULES[entry[0]] if entry[0] in DIFFUSERS_MODULES else entry[0]
        return _component(name, name, pipeline / name, library, entry[1])

    @staticmethod
    def from_elsewhere(name: str, label: str, folder: Path) -> Component:
        """Read a component from a folder of its own; its configuration names its class."""
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "_class_name" in config:
            return _component(name, label, folder, "diffusers", config["_class_name"])
        architectures = config.get("architectures")
        if architectures:
            return _component(name, label, folder, "transformers", architectures[0])
        raise ModelError(
            f"model.components.{name}: {folder} has no config.json that names a class; needed: the"
            " folder of one component, as save_pretrained writes it"
        )


class LatentFacts(NamedTuple):
    """Latent channels C and scale factor f (pixels per latent, each way) of an autoencoder."""

    channels: int
    factor: int


def _component(name: str, label: str, folder: Path, library: str, class_name: str) -> Component:
    file = folder / config_name(name)
    if not file.is_file():
        raise ModelError(f"{name}: the file {file} is missing")
    weighted = config_name(name) == "config.json"
    return Component(name, label, folder, library, class_name, weighted, read_json(file))


def config_name(component: str) -> str:
    """Return the file name of a component's configuration."""
    component = component.rpartition(".")[2]
    if component.startswith("tokenizer"):
        return "tokenizer_config.json"
    if component.endswith("scheduler"):
        return "scheduler_config.json"
    if component.startswith("feature_extractor"):
        return "preprocessor_config.json"
    return "config.json"


def pipeline_index(folder: Path) -> dict[str, Any]:
    """Read ``model_index.json``.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(
            f"model folder {folder} has no model_index.json; needed: a folder in diffusers layout,"
            " as save_pretrained writes it"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ModelError if the file holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model file {path} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"model file {path}: expected a JSON object")
    return tree


def need(component: Component, key: str) -> Any:
    """Return a value that the component's configuration must have."""
    value = component.config.get(key)
    if value is None:
        raise ModelError(
            f"{component.name}: {component.folder / config_name(component.name)} has no {key!r}"
        )
    return value


def whole(component: Component, key: str) -> int:
    """Return a whole number above 0 that the component's configuration must have."""
    value = need(component, key)
    if type(value) is not int or not 0 < value <= MOST:
        raise ModelError(_wrong(component, key, value, f"a whole number from 1 to {MOST:,}"))
    return value


def several(component: Component, key: str) -> list[Any]:
    """Return a non-empty list that the component's configuration must have."""
    value = need(component, key)
    if not isinstance(value, list) or not 0 < len(value) <= MOST_BLOCKS:
        raise ModelError(_wrong(component, key, value, f"a list of 1 to {MOST_BLOCKS}"))
    return value


def _wrong(component: Component, key: str, value: Any, allowed: str) -> str:
    file = component.folder / config_name(component.name)
    return f"{component.name}: {file} has {key} {shown(value)}; allowed: {allowed}"


def latent_facts(vae: Component) -> LatentFacts:
    """Return latent channels and scale factor, for any kind of autoencoder."""
    channels = whole(vae, "z_dim" if vae.config.get("z_dim") else "latent_channels")
    if "temperal_downsample" in vae.config:  # as diffusers spells it
        return LatentFacts(channels, 2 ** len(several(vae, "temperal_downsample")))
    own = "encoder_block_out_channels"
    blocks = several(vae, own if vae.config.get(own) else "block_out_channels")
    return LatentFacts(channels, 2 ** (len(blocks) - 1))


def with_tiny_vae(components: Sequence[Component], vae: str) -> list[Component]:
    """The components of a decode stage whose tiny autoencoder takes the place of the VAE."""
    tiny = [replace(one, name=vae, label=vae) for one in components if one.name == TINY_VAE]
    return [one for one in components if one.name not in (vae, TINY_VAE)] + tiny


def check_tiny_vae(components: Sequence[Component], vae: str) -> None:
    """Check that the tiny autoencoder, if there is one, decodes the latents of the VAE.

    Raises:
        ModelError: it is of another class, or for other latents.
    """
    named = {component.name: component for component in components}
    if TINY_VAE not in named:
        return
    tiny = named[TINY_VAE]
    if tiny.class_name != "AutoencoderTiny":
        raise ModelError(
            f"{TINY_VAE}: {tiny.folder} is a {tiny.class_name}; allowed: AutoencoderTiny"
        )
    facts, wanted = latent_facts(tiny), latent_facts(named[vae])
    _check_same(tiny, "latent channels", facts.channels, wanted.channels)
    _check_same(tiny, "pixels per latent", facts.factor, wanted.factor)


def files_of(component: Component, model: Model) -> list[Path]:
    """List every file of a component that would be loaded.

    Raises:
        ModelError: weights are missing, empty or in a format that the spec does not allow.
    """
    files = [path for path in component.folder.iterdir() if path.suffix in TEXT_FILES]
    if component.weighted:
        files += weights_of(component, model)
    return sorted(path for path in files if path.is_file())


def is_pickled(component: Component, model: Model) -> bool:
    """Whether its weights exist only as .bin, and the spec allows that."""
    return (
        component.weighted
        and model.allow_pickle
        and weights_of(component, model)[0].suffix == ".bin"
    )


def weights_of(component: Component, model: Model) -> list[Path]:
    """List the files of its weights; see ``files_of``."""
    stem = WEIGHT_STEMS[component.library]
    found = _weights(component, stem, model.variant, "safetensors")
    if not found and model.allow_pickle:
        found = _weights(component, PICKLED_STEMS[component.library], model.variant, "bin")
    if not found:
        raise ModelError(_no_weights(component, stem, model))
    for path in sorted(found):
        if not path.is_file() or path.stat().st_size == 0:
            raise ModelError(f"{component.name}: the weights {path} are missing or empty")
    return sorted(found)


def _weights(component: Component, stem: str, variant: str | None, end: str) -> set[Path]:
    globs = weight_globs(stem, variant, end)
    found = {path for glob in globs for path in component.folder.glob(glob)}
    suffix = f".{variant}" if variant else ""
    pieces = component.folder / f"{stem}.{end}.index{suffix}.json"
    if pieces.is_file():
        named = read_json(pieces).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
            raise ModelError(
                f"model file {pieces}: weight_map is not a mapping from names to files"
            )
        found |= {component.folder / name for name in named.values()}
    return found


def _no_weights(component: Component, stem: str, model: Model) -> str:
    variant = model.variant
    wanted = component.folder / (
        f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    )
    message = f"{component.name}: the weights {wanted} are missing"
    present = sorted(path.name for path in component.folder.iterdir())
    others = [name for name in present if name.endswith(".safetensors")]
    if others:
        return f"{message}; found: {', '.join(others)} (model.variant is {variant!r})"
    unsafe = [name for name in present if name.endswith(UNSAFE_WEIGHTS)]
    if not unsafe:
        return message
    message += f"; {', '.join(unsafe)} cannot be used; "
    if any(name.endswith(".bin") for name in unsafe) and not model.allow_pickle:
        return message + "allowed: safetensors, and .bin with model.allow_pickle: true"
    return message + "only safetensors is allowed"


def check_text_components(components: Sequence[Component]) -> None:
    """Check that each tokenizer fits its text encoder, and the text encoders fit the U-Net."""
    wholes = [component.name.rpartition(".")[0] for component in components]
    for whole in dict.fromkeys(wholes):  # the pipeline, and a second one inside it (refiner)
        together = [
            component for component, own in zip(components, wholes, strict=True) if own == whole
        ]
        _check_text({component.name.rpartition(".")[2]: component for component in together})


def _check_text(named: dict[str, Component]) -> None:
    text = [named[name] for name in ("text_encoder", "text_encoder_2") if name in named]
    unet = named.get("unet")
    if text and unet and all(component.config.get("hidden_size") for component in text):
        given = sum(
            component.config["hidden_size"] for component in text
        )  # embeddings are concatenated
        taken = unet.config.get("cross_attention_dim")
        projected = unet.config.get("encoder_hid_dim")
        if taken is not None and given != taken and projected is None:
            names = " and ".join(component.name for component in text)
            raise ModelError(
                f"{unet.name} takes text embeddings of width {taken}, but {names} gives {given}"
            )
    for name, encoder in named.items():
        tokenizer = named.get(name.replace("text_encoder", "tokenizer"))
        if tokenizer is None or not encoder.class_name.startswith("CLIPText"):
            continue
        reads = need(encoder, "max_position_embeddings")
        longest = tokenizer.config.get("model_max_length")
        if longest is None or longest > reads:
            raise ModelError(
                f"{tokenizer.name}: {tokenizer.folder / 'tokenizer_config.json'} has"
                f" model_max_length {longest}, but {name} reads only {reads} tokens"
            )


CONTROL_CLASSES = {"controlnet": "ControlNetModel", "adapter": "T2IAdapter"}


def check_control_components(components: Sequence[Component]) -> None:
    """Check that each ControlNet or T2I-Adapter fits the U-Net to which its outputs are added."""
    named = {component.name: component for component in components}
    unet = named.get("unet")
    for component in components:
        wanted = CONTROL_CLASSES.get(component.name)
        if unet is None or wanted is None:
            continue
        if component.class_name.startswith("Multi"):
            raise ModelError(
                f"{component.name}: {component.folder.parent} holds several, as a "
                f"{component.class_name}; list the folder of each in "
                f"model.components.{component.name}"
            )
        if component.class_name != wanted:
            raise ModelError(
                f"{component.name}: {component.folder} is a {component.class_name}, not a {wanted}"
            )
        factor = latent_facts(named["vae"]).factor
        check = _check_controlnet if component.name == "controlnet" else _check_adapter
        check(component, unet, factor)


def _check_controlnet(component: Component, unet: Component, factor: int) -> None:
    for key in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        _check_same(component, key, need(component, key), need(unet, key))
    reader = component.config.get("conditioning_embedding_out_channels")
    if reader is not None:
        _check_same(component, "the number of pixels per latent", 2 ** (len(reader) - 1), factor)


def _check_adapter(component: Component, unet: Component, factor: int) -> None:
    channels, blocks = list(need(component, "channels")), list(need(unet, "block_out_channels"))
    _check_same(component, "channels", channels[: len(blocks)], blocks[: len(channels)])
    # A first block without attention halves the size before the adapter's output is added.
    halved = "CrossAttn" not in need(unet, "down_block_types")[0]
    _check_same(
        component, "downscale_factor", need(component, "downscale_factor"), factor * (1 + halved)
    )


def _check_same(component: Component, what: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        raise ModelError(
            f"{component.name} {component.folder} does not fit the model: {what} is {given} "
            f"there, but {wanted} in the model"
        )
