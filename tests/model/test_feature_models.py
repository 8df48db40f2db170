"""Features of image models: every weight is one of the files, so each load gives the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from batchgen.errors import ModelError
from batchgen.models.extractors import load_extractor
from batchgen.models.scorers import check_scorers, load, models
from batchgen.models.scorers import networks as scorer_networks
from batchgen.spec.score_section import ScorerSpec
from batchgen.stages.scorers.scorer import Scored
from tests import scorer_models

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
SCHEMA = pa.schema([("key", pa.string())])


def embedding(folder: Path) -> np.ndarray[Any, Any]:
    """The features of an image, with the model loaded anew."""
    models._features_on.cache_clear()
    load._LOADED.clear()
    specs = check_scorers([ScorerSpec(scorer="embedding", model=str(folder))], SCHEMA)
    (scorer,) = load.load_scorers(specs)
    return np.asarray(scorer(Scored([IMAGE]))["embedding"][0], np.float32)


def extracted(folder: Path) -> np.ndarray[Any, Any]:
    return load_extractor(str(folder))([IMAGE])[0]


WITHOUT_POOLER = {
    "classifier": lambda folder: scorer_models.classifier(folder, ["a", "b"]),
    "ViT": lambda folder: scorer_models.image_model(folder, "ViTModel", add_pooling_layer=False),
    "DeiT": lambda folder: scorer_models.image_model(folder, "DeiTForImageClassification"),
    "YOLOS": lambda folder: scorer_models.detector(folder, ["a", "b"]),
}


@pytest.mark.parametrize("name", WITHOUT_POOLER)
@pytest.mark.parametrize("features", [embedding, extracted])
def test_a_model_without_a_pooler_gives_its_class_token_at_each_load(
    tmp_path: Path, name: str, features: Callable[[Path], Any]
) -> None:
    folder = WITHOUT_POOLER[name](tmp_path / "model")
    first, second = features(folder), features(folder)
    assert np.ptp(first) > 0 and np.array_equal(first, second)


@pytest.mark.parametrize("features", [embedding, extracted])
def test_a_pooler_that_the_file_has_is_used(
    tmp_path: Path, features: Callable[[Path], Any]
) -> None:
    folder = scorer_models.image_model(tmp_path / "model", "ViTModel")
    first = features(folder)
    weights = load_file(folder / "model.safetensors")
    weights["pooler.dense.weight"] *= -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert not np.allclose(features(folder), first, atol=1e-3)


@pytest.mark.parametrize("features", [embedding, extracted])
def test_models_that_hide_random_parts_are_refused(
    tmp_path: Path, features: Callable[[Path], Any]
) -> None:
    folder = scorer_models.image_model(tmp_path / "mae", "ViTMAEForPreTraining")
    with pytest.raises(ModelError, match=r"(score: embedding|features '.*'): .*mae holds a model"):
        features(folder)


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = scorer_models.classifier(tmp_path / "model", ["a", "b"])
    weights = load_file(folder / "model.safetensors")
    kept = {name: one for name, one in weights.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    words = "lacks weights of a ViTForImageClassification: classifier.bias, classifier.weight; need"
    with pytest.raises(ModelError, match=words):
        scorer_networks.logits_of(folder, "cpu", 1)
    for name in ("vit.layernorm.weight", "vit.layernorm.bias"):
        del kept[name]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for features in (embedding, extracted):
        with pytest.raises(
            ModelError, match=r"lacks weights of a ViTModel: layernorm.bias, layern"
        ):
            features(folder)


TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "vocab_size": 64}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "MobileViTForImageClassification": ({"image_size": 32}, 640),
    "MobileNetV2ForImageClassification": ({"image_size": 32}, 1280),
    "SiglipModel": (
        {
            "vision_config": scorer_models._VISION,
            "text_config": {**TEXT, "num_attention_heads": 4},
        },
        32,
    ),
    "SwinForImageClassification": (
        {
            **{"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]},
            **{"num_heads": [2, 2], "window_size": 4},
        },
        16,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_planning_knows_the_number_of_features(tmp_path: Path, name: str) -> None:
    config, size = SIZES[name]
    folder = scorer_models.image_model(tmp_path / "model", name, config)
    spec = ScorerSpec(scorer="embedding", model=str(folder))
    (found,) = check_scorers([spec], SCHEMA)
    assert found.settled is not None
    assert found.settled.columns == {"embedding": f"list<halffloat>[{size}]"}
    assert embedding(folder).shape == (size,)
