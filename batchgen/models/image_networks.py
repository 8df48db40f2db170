"""Loads image models of transformers with the weights of their files only, and pools features."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError
from batchgen.models.libraries import quiet_libraries

COUNTER = "num_batches_tracked"  # of batch norms; evaluation does not read it
POOLER = "pooler."
RANDOM = ("vit_mae",)  # types of models that hide random parts of each image
SHOWN = 3


def refuse_random(model_type: object, folder: Path) -> None:
    """Refuse a type of model whose features of one image differ from call to call.

    Raises:
        ModelError: it is of such a type.
    """
    if model_type in RANDOM:
        raise ModelError(
            f"{folder} holds a model of the type {model_type}, which hides random parts of each "
            "image: its features of one image differ from call to call; needed: another image "
            "model, such as ViT, DINOv2, ResNet or a CLIP"
        )


def load_network(kind: str, folder: Path) -> Any:
    """A transformers model on the CPU, with no weights but those of its files.

    transformers makes up weights that a file does not have, others at each load. If only those of
    the pooling layer are missing, the model is loaded without it, and gives its class token.

    Args:
        kind: the name of its class in transformers, such as ``AutoModel``.
        folder: that of its files.

    Raises:
        ModelError: the files lack weights.
        Exception: whatever transformers raises.
    """
    import transformers

    quiet_libraries()
    load = getattr(transformers, kind).from_pretrained
    network, missing = _loaded(load, folder)
    takes_pooler = "add_pooling_layer" in inspect.signature(type(network).__init__).parameters
    if missing and takes_pooler and all(key.startswith(POOLER) for key in missing):
        network, missing = _loaded(load, folder, add_pooling_layer=False)
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ModelError(
            f"{folder} lacks weights of a {type(network).__name__}: {', '.join(missing[:SHOWN])}"
            f"{more}; needed: files with all of its weights"
        )
    refuse_random(network.config.model_type, folder)
    return network.float().eval().requires_grad_(False)


def _loaded(load: Callable[..., Any], folder: Path, **how: Any) -> tuple[Any, list[str]]:
    """A model, and the names of the weights that its files lack."""
    network, told = load(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **how
    )
    return network, sorted(key for key in told["missing_keys"] if not key.endswith(COUNTER))


def feature_size(folder: Path, shape: tuple[int, ...]) -> int:
    """The number of features that an image model gives, found without its weights.

    The network is built and called without memory for its numbers.

    Args:
        folder: that of its files.
        shape: of one prepared image.

    Raises:
        Exception: whatever transformers or the network raises.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    quiet_libraries()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"), torch.inference_mode():
        network = AutoModel.from_config(config).eval()
        return int(image_features(network, torch.empty((1, *shape))).shape[1])


def image_features(network: Any, pixels: Any) -> Any:
    """Features (B, d) of a batch: of a CLIP those of its space, else those that the model pools.

    Those of a model without a pooling layer are its class token, or the mean of its map.
    """
    if hasattr(network, "get_image_features"):
        found = network.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)
    else:
        result = network(pixel_values=pixels)
        found = getattr(result, "pooler_output", None)
        if found is None:
            found = result.last_hidden_state
    if found.ndim == 3:  # (B, T, d): the class token
        return found[:, 0]
    return found if found.ndim == 2 else found.mean(dim=(2, 3))
