"""Networks that turn images into features, by which sets of images are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchgen.errors import ModelError, nearest
from batchgen.images.resize import resized_to
from batchgen.models import efficientnet_lite
from batchgen.models.find import HUB_ID, SHIPPED, shipped_networks
from batchgen.models.image_networks import image_features, load_network

Array = np.ndarray[Any, Any]

DEFAULT = efficientnet_lite.NAME
BATCH = 32  # images in each call; a smaller batch is padded, so that neighbours change nothing
VERSION = 1  # of how images are prepared


@dataclass(frozen=True)
class Extractor:
    """A network of features.

    Attributes:
        name: as given, for people.
        fingerprint: SHA-256 of its weights and of how it reads images.
        run: BATCH images, uint8 RGB of any size, to float32 (BATCH, d).
    """

    name: str
    fingerprint: str
    run: Callable[[Sequence[Array]], Array]

    def __call__(self, images: Sequence[Array]) -> Array:
        """Features (n, d), float32. Those of an image do not depend on the others in the call."""
        found = []
        for start in range(0, len(images), BATCH):
            batch = list(images[start : start + BATCH])
            padded = batch + [batch[-1]] * (BATCH - len(batch))
            found.append(np.asarray(self.run(padded), dtype=np.float32)[: len(batch)])
        return np.concatenate(found)


def load_extractor(name: str, revision: str | None = None) -> Extractor:
    """The extractor of this name, on the CPU.

    Args:
        name: ``efficientnet-lite0``, the name of a shipped model, the folder of a transformers
            image model, or its id on the Hugging Face Hub.
        revision: of the Hub's model; default: its main branch.

    Raises:
        ModelError: there is no such model, or it gives no features of images.
    """
    if name == efficientnet_lite.NAME:
        return _efficientnet()
    return _transformers(name, _folder(name, revision))


def _efficientnet() -> Extractor:
    network = efficientnet_lite.load()
    mean, deviation = efficientnet_lite.MEAN, efficientnet_lite.DEVIATION

    def run(images: Sequence[Array]) -> Array:
        small = np.stack([resized_to(one, efficientnet_lite.SIDE) for one in images])
        pixels = (torch.from_numpy(small).permute(0, 3, 1, 2).float() - mean) / deviation
        with torch.inference_mode():
            return np.asarray(network(pixels))

    facts = [VERSION, efficientnet_lite.SHA256, efficientnet_lite.SIDE, BATCH]
    return Extractor(efficientnet_lite.NAME, _digest(facts), run)


def _folder(name: str, revision: str | None) -> Path:
    """The folder of a transformers model."""
    for folder in (Path(name), SHIPPED / name):
        if (folder / "config.json").is_file():
            return folder
    if Path(name).is_dir() or not HUB_ID.fullmatch(name):
        known = [DEFAULT, *shipped_networks()]
        raise ModelError(
            f"features {name!r}: it is neither a folder with a config.json of transformers, nor an "
            f"id of the Hugging Face Hub, nor one of {', '.join(known)}{nearest(name, known)}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(
            f"features {name!r}: the Hugging Face Hub does not give it: {first}"
        ) from None


def _transformers(name: str, folder: Path) -> Extractor:
    from transformers import AutoImageProcessor

    from batchgen.models.libraries import quiet_libraries

    quiet_libraries()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"features {name!r}: {folder} has no weights in the form of safetensors")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = load_network("AutoModel", folder)
    except ModelError as error:
        raise ModelError(f"features {name!r}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"features {name!r}: transformers cannot load {folder}: {first}") from None

    def run(images: Sequence[Array]) -> Array:
        prepared = processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return np.asarray(image_features(model, prepared))

    try:
        run([np.zeros((32, 32, 3), dtype=np.uint8)] * 2)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"features {name!r}: it gives no features of images: {first}") from None
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    return Extractor(name, _digest([VERSION, sums, config, settings, BATCH]), run)


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
