"""Scorers by name: how they are written, checked and loaded; those that need no weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from batchgen.errors import ModelError, SpecError
from batchgen.images.perceptual_hash import perceptual_hash
from batchgen.models.scorers import check_scorers, load_scorers
from batchgen.spec.build import build
from batchgen.spec.score_section import ScorerSpec, read_scorer
from batchgen.spec.spec import result_fields
from batchgen.stages.scorers.scorer import Scored, kind_named, kind_text

SCHEMA = pa.schema([("key", pa.string()), ("label", pa.string())])
MINIMAL: dict[str, Any] = {"input": {"path": "in.parquet"}, "output": {"url": "out"}}
OWN = """
import pyarrow as pa
from batchgen.stages.scorers.scorer import ScoreColumn, scores

@scores(ScoreColumn("redness", pa.float32(), "mean of red"), reads=["label"])
def redness(images):
    return {"redness": [float(one[..., 0].mean()) for one in images.pixels]}

def above(limit):
    @scores(ScoreColumn("is_red", pa.bool_(), "red enough"), version=str(limit))
    def judged(images):
        return {"is_red": [bool(one[..., 0].mean() > limit) for one in images.pixels]}
    return judged

@scores(ScoreColumn("day", pa.date32(), ""))
def dated(images):
    return {}

number = 5
"""


def noise(height: int = 40, width: int = 64, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(seed: int, side: int = 96) -> np.ndarray[Any, Any]:
    image = Image.fromarray(noise(8, 8, seed)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def score(spec: str, *images: np.ndarray[Any, Any]) -> dict[str, Any]:
    (scorer,) = load_scorers(check_scorers([read_scorer(spec)], SCHEMA))
    return dict(scorer(Scored(images)))


@pytest.mark.parametrize("seed", range(40))
def test_the_hash_is_that_of_imagehash(seed: int) -> None:
    for pixels in (noise(9 + seed, 80, seed), smooth(seed), smooth(seed, 24)):
        assert perceptual_hash(pixels) == int(str(imagehash.phash(Image.fromarray(pixels))), 16)


@pytest.mark.parametrize("level", [0, 3, 128, 255])
def test_the_hash_of_a_flat_image_is_not_noise(level: int) -> None:
    assert perceptual_hash(np.full((50, 30, 3), level, np.uint8)) == (1 << 63 if level else 0)


def test_near_copies_have_near_hashes_and_others_have_not() -> None:
    pixels = smooth(5)
    near = np.clip(pixels.astype(int) + noise(96, 96, 1) % 5, 0, 255).astype(np.uint8)
    found = score("phash", pixels, near, smooth(6))["phash"]
    assert (found[0] ^ found[1]).bit_count() <= 4 < 16 < (found[0] ^ found[2]).bit_count()


def test_quality_tells_blank_dark_and_blurred_from_clean_images() -> None:
    pixels = noise(10, 16).repeat(8, axis=0).repeat(8, axis=1)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(4)))
    nearly = np.full_like(pixels, 200)
    nearly[::7, ::7] = 201
    found = score("quality", pixels, nearly, pixels // 16, blurred)
    assert found["is_blank"] == [False, True, False, False]
    assert found["is_dark"] == [False, False, True, False]
    assert found["is_blurred"] == [False, False, False, True]
    assert found["brightness"][1] == pytest.approx(200, abs=0.1)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """Checked against OpenCV, whose luma is rounded to whole levels."""
    import cv2

    pixels = noise()
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float64)
    expected = cv2.Laplacian(grey, cv2.CV_64F)[1:-1, 1:-1].var()
    found = score("quality", pixels)
    assert found["sharpness"][0] == pytest.approx(expected, rel=2e-3)
    assert found["relative_sharpness"][0] == pytest.approx(expected / grey.var(), rel=5e-3)
    paler = score("quality", 128 + pixels // 8)
    assert paler["relative_sharpness"][0] == pytest.approx(expected / grey.var(), rel=0.05)


def test_an_image_of_two_pixels_has_a_quality() -> None:
    assert score("quality", noise(1, 2))["sharpness"] == [0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("phas", "score.scorer: got 'phas'; allowed: phash, quality, .*did you mean 'phash'"),
        ("phash=here", "score.model is set to 'here', but phash reads no model; remove it"),
        ("{scorer: quality, options: {dark: 3}}", "score.options.dark: got 3; allowed: blank_be"),
        ("{scorer: quality, options: {dark_below: 300}}", "dark_below: got 300; allowed: a num"),
        ("{name: phash}", "scorer: got nothing; needed: text"),
        ("", "score.scorer: got ''"),
    ],
)
def test_a_wrong_scorer_is_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_scorer(text)


def test_the_spec_takes_texts_and_mappings() -> None:
    tree = MINIMAL | {"score": ["phash", {"scorer": "quality", "options": {"dark_below": 9}}]}
    spec = build(tree)
    assert [one.scorer for one in spec.score] == ["phash", "quality"]
    assert spec.score[1].read_options().dark_below == 9
    assert build(spec.model_dump(mode="json")) == spec


def test_a_wrong_scorer_in_a_spec_is_reported_with_its_field() -> None:
    with pytest.raises(SpecError, match=r"score\.scorer: got 'quallity'; allowed: phash, quality"):
        build(MINIMAL | {"score": ["quallity"]})


def test_a_spec_without_scorers_keeps_its_fingerprint() -> None:
    whole = build(MINIMAL).model_dump(mode="json")
    before = {name: value for name, value in whole.items() if name != "score"}
    assert result_fields(whole) == result_fields(before)
    assert build(MINIMAL | {"score": ["phash"]}).fingerprint != build(MINIMAL).fingerprint


def test_settled_scorers_name_their_columns_and_types() -> None:
    (spec,) = check_scorers([read_scorer("phash")], SCHEMA)
    assert spec.settled is not None
    assert spec.settled.columns == {"phash": "uint64"} and spec.settled.fingerprint == "phash/1"
    assert ScorerSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_scorer_that_was_settled_otherwise_is_refused() -> None:
    (spec,) = check_scorers([read_scorer("quality")], SCHEMA)
    other = spec.model_copy(update={"options": {"dark_below": 1}})
    with pytest.raises(ModelError, match="scorer quality is not the one that was planned"):
        check_scorers([other], SCHEMA)
    with pytest.raises(ModelError, match="scorer quality is not the one that was planned"):
        load_scorers([other])


def test_two_scorers_of_one_column_are_refused() -> None:
    with pytest.raises(SpecError, match="two scorers fill the column phash; remove one"):
        check_scorers([read_scorer("phash"), read_scorer("phash")], SCHEMA)


def test_a_scorer_is_loaded_once() -> None:
    specs = check_scorers([read_scorer("phash")], SCHEMA)
    assert load_scorers(specs)[0] is load_scorers(specs)[0]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.bool_(), pa.uint64(), pa.float32(), pa.string(), pa.list_(pa.string())),
        *(pa.list_(pa.float16(), 12), pa.list_(pa.float64())),
    ],
)
def test_types_of_columns_are_restored_from_their_text(kind: pa.DataType) -> None:
    assert kind_named(kind_text(kind)) == kind


def test_a_type_that_is_no_score_is_refused() -> None:
    with pytest.raises(ValueError, match="the type binary; allowed: bool, int32"):
        kind_text(pa.binary())


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_of_ones_own_is_a_scorer(own: str) -> None:
    assert score(f"{own}:redness", np.full((3, 3, 3), 7, np.uint8)) == {"redness": [7.0]}


def test_a_function_that_returns_a_scorer_gets_its_options(own: str) -> None:
    pixels = np.full((3, 3, 3), 7, np.uint8)
    for limit, verdict in ((6, True), (7, False)):
        text = f"{{scorer: '{own}:above', options: {{limit: {limit}}}}}"
        assert score(text, pixels) == {"is_red": [verdict]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "cannot be imported .AttributeError"),
        ("number", "cannot be made with the options none"),
        ("above", "missing 1 required positional argument: 'limit'"),
        ("dated", "one of its columns has the type date32"),
    ],
)
def test_a_wrong_scorer_of_ones_own_is_refused(own: str, name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check_scorers([read_scorer(f"{own}:{name}")], SCHEMA)


def test_a_column_that_a_scorer_reads_must_be_there(own: str) -> None:
    with pytest.raises(SpecError, match="reads the column 'label', which the output does not have"):
        check_scorers([read_scorer(f"{own}:redness")], pa.schema([("key", pa.string())]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{scorer: nsfw, revision: abc}", "score.revision is set to 'abc', but nsfw reads no mode"),
        ("{scorer: nsfw, options: {unsafe: [rude]}}", "nsfw without a model has no classes; rem"),
    ],
)
def test_nsfw_without_a_model_refuses_what_it_would_ignore(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_scorer(text)
