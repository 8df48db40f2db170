"""Loads the models of scorers with transformers, and calls them on batches of one size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from batchgen.errors import ModelError
from batchgen.models import image_networks
from batchgen.models.image_networks import image_features
from batchgen.models.libraries import quiet_libraries
from batchgen.stages.scorers.batches import Batches
from batchgen.stages.scorers.detection import Seen
from batchgen.stages.scorers.scorer import Array

MOST_TEXTS = 10_000  # whose features are kept


def image_processor(folder: Path) -> Any:
    """The model's own preparation of images, by Pillow, which rounds alike on every machine."""
    from transformers import AutoImageProcessor

    quiet_libraries()
    return _loaded(
        lambda: AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
        folder,
    )


def prepared_by(processor: Any) -> Callable[[Array], Array]:
    """A function that prepares one image (height, width, 3) as (channels, height, width)."""

    def prepare(pixels: Array) -> Array:
        found = processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
        array: Array = np.asarray(found["pixel_values"][0], np.float32)
        return array

    return prepare


def load_network(kind: str, folder: Path, device: str) -> Any:
    """A transformers model in evaluation mode on a torch device, see ``image_networks``."""
    return _loaded(lambda: image_networks.load_network(kind, folder), folder).to(device)


def _loaded(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except ModelError as error:
        raise ModelError(f"score: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"score: transformers cannot load {folder}: {first}") from error


@cache
def feature_size(folder: Path, sha256: str) -> int | None:
    """The number of features of an image model; None if only its weights would tell.

    ``sha256``: of its files, so that others are looked at again.
    """
    blank = np.zeros((64, 48, 3), np.uint8)
    prepared = prepared_by(image_processor(folder))(blank)
    try:
        return image_networks.feature_size(folder, prepared.shape)
    except Exception:  # a network that cannot be called without numbers, in whatever way
        return None


def logits_of(folder: Path, device: str, size: int) -> Batches:
    """Images -> logits of an image classifier."""
    network = load_network("AutoModelForImageClassification", folder, device)
    return Batches(
        prepared_by(image_processor(folder)),
        _on(device, lambda pixels: network(pixel_values=pixels).logits),
        size,
    )


def features_of(folder: Path, device: str, size: int) -> Batches:
    """Images -> features of length 1: those of a CLIP, else what the model pools."""
    network = load_network("AutoModel", folder, device)
    return Batches(
        prepared_by(image_processor(folder)),
        _on(device, lambda pixels: image_features(network, pixels), unit=True),
        size,
    )


class Texts:
    """Texts -> features of a CLIP, of length 1; those of texts that repeat are kept."""

    def __init__(self, network: Any, folder: Path, device: str, size: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = _loaded(
            lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True), folder
        )
        most = network.config.text_config.max_position_embeddings

        def prepare(text: str) -> Array:
            words = tokenizer(text, padding="max_length", truncation=True, max_length=most)
            both: Array = np.array([words["input_ids"], words["attention_mask"]], np.int64)
            return both

        def run(words: Any) -> Any:
            found = network.get_text_features(input_ids=words[:, 0], attention_mask=words[:, 1])
            return getattr(found, "pooler_output", found)

        self._batches = Batches(prepare, _on(device, run, unit=True), size)
        self._kept: OrderedDict[str, Array] = OrderedDict()
        self._turn = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[Array]:
        with self._turn:
            new = [text for text in dict.fromkeys(texts) if text not in self._kept]
            self._kept.update(zip(new, self._batches(new), strict=True))
            found = [self._kept[text] for text in texts]
            while len(self._kept) > MOST_TEXTS:
                self._kept.popitem(last=False)
            return found


def clip_of(folder: Path, device: str, size: int) -> tuple[Batches, Texts]:
    """The functions of a CLIP that give the features of images and of texts."""
    network = load_network("AutoModel", folder, device)
    images = Batches(
        prepared_by(image_processor(folder)),
        _on(device, lambda pixels: image_features(network, pixels), unit=True),
        size,
    )
    return images, Texts(network, folder, device, size)


def detector_of(
    folder: Path, device: str, size: int, threshold: float
) -> Callable[[Sequence[Array]], list[list[Seen]]]:
    """Images -> what an object detector sees, with boxes in pixels of each image."""
    import torch

    network = load_network("AutoModelForObjectDetection", folder, device)
    processor = image_processor(folder)

    def run(pixels: Array) -> Any:
        with torch.inference_mode():
            found = network(pixel_values=torch.from_numpy(pixels).to(device))
            return processor.post_process_object_detection(found, threshold, target_sizes=None)

    batches = Batches(prepared_by(processor), run, size)

    def detect(images: Sequence[Array]) -> list[list[Seen]]:
        return [
            _seen(found, image.shape[1], image.shape[0])
            for found, image in zip(batches(images), images, strict=True)
        ]

    return detect


def _seen(found: Any, width: int, height: int) -> list[Seen]:
    """What was detected, with boxes given as fractions of the image's size."""
    sides = (width, height, width, height)
    listed = zip(
        found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
    )
    return [
        Seen(kind, score, tuple(part * side for part, side in zip(box, sides, strict=True)))
        for kind, score, box in listed
    ]


def _on(device: str, call: Callable[[Any], Any], unit: bool = False) -> Callable[[Array], Array]:
    """Call a torch function on a device with a numpy array; ``unit`` makes results of length 1."""
    import torch

    def run(batch: Array) -> Array:
        with torch.inference_mode():
            found = call(torch.from_numpy(batch).to(device)).float()
            array: Array = found.cpu().numpy()
        if unit:
            lengths = np.sqrt((array.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
            array = (array / np.maximum(lengths, 1e-12)).astype(np.float32)
        return array

    return run
