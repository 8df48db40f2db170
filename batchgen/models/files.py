"""The files of one model component: its configuration, its weights, and whether they are whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from batchgen.spec.model import Model

# Components whose class stands in a module of diffusers are saved under that module's name;
# module -> the library in whose form their weights are.
DIFFUSERS_MODULES = {"latent_diffusion": "transformers", "stable_diffusion": "diffusers"}
MOST = 1_000_000  # of channels, sizes and classes that any model has
MOST_BLOCKS = 16
OWN_CLASSES = ("ClassEmbedder",)  # of ``replicas.own``


@dataclass(frozen=True)
class Part:
    """One component.

    Attributes:
        name: the component's name in the pipeline.
        label: its name in the manifest; of several of one name, with a number.
        folder: where its files stand.
        library: ``diffusers``, ``transformers`` or, for ``OWN_CLASSES``, ``batchgen``.
        class_name: the class it was saved from.
        config: its configuration.
        weighted: it has weights.
    """

    name: str
    label: str
    folder: Path
    library: str
    class_name: str
    weighted: bool
    config: dict[str, Any] = field(repr=False)

    @staticmethod
    def from_index(pipeline: Path, name: str, entry: Any) -> Part:
        """The component of a pipeline's folder that ``model_index.json`` has under ``name``."""
        index = pipeline / "model_index.json"
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            raise ModelError(f"{name}: {index} names none")
        own = entry[0] == "batchgen" and entry[1] in OWN_CLASSES
        if not own and entry[0] not in ("diffusers", "transformers", *DIFFUSERS_MODULES):
            raise ModelError(
                f"{name}: {index} names {entry[0]}.{entry[1]}; allowed: classes of diffusers and"
                " transformers (code that comes with a model is never run)"
            )
        if not (pipeline / name).is_dir():
            raise ModelError(f"{name}: the folder {pipeline / name} is missing")
        library = DIFFUSERS_MODULES[entry[0]] if entry[0] in DIFFUSERS_MODULES else entry[0]
        return _part(name, name, pipeline / name, library, entry[1])

    @staticmethod
    def from_elsewhere(name: str, label: str, folder: Path) -> Part:
        """A component in a folder of its own, whose configuration names its class."""
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "_class_name" in config:
            return _part(name, label, folder, "diffusers", config["_class_name"])
        architectures = config.get("architectures")
        if architectures:
            return _part(name, label, folder, "transformers", architectures[0])
        raise ModelError(
            f"model.components.{name}: {folder} has no config.json that names a class; allowed: a"
            " component's folder, as save_pretrained writes it"
        )


class LatentFacts(NamedTuple):
    """C and f of an autoencoder."""

    channels: int
    factor: int


def _part(name: str, label: str, folder: Path, library: str, class_name: str) -> Part:
    file = folder / config_name(name)
    if not file.is_file():
        raise ModelError(f"{name}: the file {file} is missing")
    weighted = config_name(name) == "config.json"
    return Part(name, label, folder, library, class_name, weighted, read_json(file))


def config_name(component: str) -> str:
    """The file that a component's configuration stands in, by its name."""
    component = component.rpartition(".")[2]
    if component.startswith("tokenizer"):
        return "tokenizer_config.json"
    if component.endswith("scheduler"):
        return "scheduler_config.json"
    if component.startswith("feature_extractor"):
        return "preprocessor_config.json"
    return "config.json"


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
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError if the file holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model file {path} cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"model file {path}: expected a JSON object")
    return tree


def need(part: Part, key: str) -> Any:
    """A value that the component's configuration must have."""
    value = part.config.get(key)
    if value is None:
        raise ModelError(f"{part.name}: {part.folder / config_name(part.name)} has no {key!r}")
    return value


def whole(part: Part, key: str) -> int:
    """A whole number above 0 that the component's configuration must have."""
    value = need(part, key)
    if type(value) is not int or not 0 < value <= MOST:
        raise ModelError(_wrong(part, key, value, f"a whole number from 1 to {MOST:,}"))
    return value


def several(part: Part, key: str) -> list[Any]:
    """A list, with something in it, that the component's configuration must have."""
    value = need(part, key)
    if not isinstance(value, list) or not 0 < len(value) <= MOST_BLOCKS:
        raise ModelError(_wrong(part, key, value, f"a list of 1 to {MOST_BLOCKS}"))
    return value


def _wrong(part: Part, key: str, value: Any, allowed: str) -> str:
    file = part.folder / config_name(part.name)
    return f"{part.name}: {file} has {key} {shown(value)}; allowed: {allowed}"


def latent_facts(vae: Part) -> LatentFacts:
    """Latent channels and scale factor, whatever the kind of autoencoder."""
    channels = whole(vae, "z_dim" if vae.config.get("z_dim") else "latent_channels")
    if "temperal_downsample" in vae.config:  # as diffusers spells it
        return LatentFacts(channels, 2 ** len(several(vae, "temperal_downsample")))
    own = "encoder_block_out_channels"
    blocks = several(vae, own if vae.config.get(own) else "block_out_channels")
    return LatentFacts(channels, 2 ** (len(blocks) - 1))


def files_of(part: Part, model: Model) -> list[Path]:
    """Every file of a component that would be loaded.

    Raises:
        ModelError: weights are missing, empty or in a form that the spec does not allow.
    """
    files = [path for path in part.folder.iterdir() if path.suffix in TEXT_FILES]
    if part.weighted:
        files += weights_of(part, model)
    return sorted(path for path in files if path.is_file())


def is_pickled(part: Part, model: Model) -> bool:
    """Its weights are there as .bin alone, and the spec allows it."""
    return part.weighted and model.allow_pickle and weights_of(part, model)[0].suffix == ".bin"


def weights_of(part: Part, model: Model) -> list[Path]:
    """The files of its weights; see ``files_of``."""
    stem = WEIGHT_STEMS[part.library]
    found = _weights(part, stem, model.variant, "safetensors")
    if not found and model.allow_pickle:
        found = _weights(part, PICKLED_STEMS[part.library], model.variant, "bin")
    if not found:
        raise ModelError(_no_weights(part, stem, model))
    for path in sorted(found):
        if not path.is_file() or path.stat().st_size == 0:
            raise ModelError(f"{part.name}: the weights {path} are missing or empty")
    return sorted(found)


def _weights(part: Part, stem: str, variant: str | None, end: str) -> set[Path]:
    globs = weight_globs(stem, variant, end)
    found = {path for glob in globs for path in part.folder.glob(glob)}
    suffix = f".{variant}" if variant else ""
    pieces = part.folder / f"{stem}.{end}.index{suffix}.json"
    if pieces.is_file():
        named = read_json(pieces).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
            raise ModelError(f"model file {pieces}: weight_map is no mapping from names to files")
        found |= {part.folder / name for name in named.values()}
    return found


def _no_weights(part: Part, stem: str, model: Model) -> str:
    variant = model.variant
    wanted = part.folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    message = f"{part.name}: the weights {wanted} are missing"
    present = sorted(path.name for path in part.folder.iterdir())
    others = [name for name in present if name.endswith(".safetensors")]
    if others:
        return f"{message}; there are {', '.join(others)} (model.variant is {variant!r})"
    unsafe = [name for name in present if name.endswith(UNSAFE_WEIGHTS)]
    if not unsafe:
        return message
    message += f"; {', '.join(unsafe)} cannot be used: allowed is safetensors alone"
    if any(name.endswith(".bin") for name in unsafe) and not model.allow_pickle:
        message += ", and .bin with model.allow_pickle: true"
    return message


def check_text_parts(parts: Sequence[Part]) -> None:
    """That each tokenizer fits its text encoder and, where there is one, that the U-Net does."""
    wholes = [part.name.rpartition(".")[0] for part in parts]
    for whole in dict.fromkeys(wholes):  # the pipeline, and a second one that it has
        together = [part for part, own in zip(parts, wholes, strict=True) if own == whole]
        _check_text({part.name.rpartition(".")[2]: part for part in together})


def _check_text(named: dict[str, Part]) -> None:
    text = [named[name] for name in ("text_encoder", "text_encoder_2") if name in named]
    unet = named.get("unet")
    if text and unet and all(part.config.get("hidden_size") for part in text):
        given = sum(part.config["hidden_size"] for part in text)  # they are put side by side
        taken = unet.config.get("cross_attention_dim")
        projected = unet.config.get("encoder_hid_dim")
        if taken is not None and given != taken and projected is None:
            names = " and ".join(part.name for part in text)
            raise ModelError(
                f"{unet.name} attends to embeddings of width {taken}, {names} gives {given}"
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
                f" model_max_length {longest}, the {name} reads {reads} tokens"
            )


CONTROL_CLASSES = {"controlnet": "ControlNetModel", "adapter": "T2IAdapter"}


def check_control_parts(parts: Sequence[Part]) -> None:
    """That each ControlNet or T2I-Adapter fits the U-Net that its outputs are added to."""
    named = {part.name: part for part in parts}
    unet = named.get("unet")
    for part in parts:
        wanted = CONTROL_CLASSES.get(part.name)
        if unet is None or wanted is None:
            continue
        if part.class_name.startswith("Multi"):
            raise ModelError(
                f"{part.name}: {part.folder.parent} holds several, as a {part.class_name}; give the"
                f" folder of each by model.components.{part.name}"
            )
        if part.class_name != wanted:
            raise ModelError(f"{part.name}: {part.folder} is a {part.class_name}, not a {wanted}")
        factor = latent_facts(named["vae"]).factor
        check = _check_controlnet if part.name == "controlnet" else _check_adapter
        check(part, unet, factor)


def _check_controlnet(part: Part, unet: Part, factor: int) -> None:
    for key in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        _check_same(part, key, need(part, key), need(unet, key))
    reader = part.config.get("conditioning_embedding_out_channels")
    if reader is not None:
        _check_same(part, "pixels a latent", 2 ** (len(reader) - 1), factor)


def _check_adapter(part: Part, unet: Part, factor: int) -> None:
    channels, blocks = list(need(part, "channels")), list(need(unet, "block_out_channels"))
    _check_same(part, "channels", channels[: len(blocks)], blocks[: len(channels)])
    # It adds to what a block without attention makes after that block has halved the size.
    halved = "CrossAttn" not in need(unet, "down_block_types")[0]
    _check_same(part, "downscale_factor", need(part, "downscale_factor"), factor * (1 + halved))


def _check_same(part: Part, what: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        raise ModelError(
            f"{part.name} {part.folder} does not fit the model: {what} is {given}, the model's is"
            f" {wanted}"
        )
