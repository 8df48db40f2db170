"""Complete runs on real Ray with the shipped model: the same result in any layout and order."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchgen import runner
from batchgen.errors import PlanChanged
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Counts, Marker
from batchgen.output.outcome import Outcome
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.in_process import stream
from tests.outputs import digests_of, rejects_of, spec_for, table_of

pytestmark = pytest.mark.usefixtures("ray_session")
Prompts = Callable[..., Path]


def ledger(output: Path) -> Ledger:
    return Ledger(open_store(str(output)))


def make(source: Path, output: Path, **settings: Any) -> Outcome:
    return runner.run(spec_for(source, output, **settings), quiet=True)


def make_here(source: Path, output: Path, **settings: Any) -> None:
    """The same stream in this process: where samples are compared, not how Ray carries them."""
    stream(spec_for(source, output, **settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, Path]:
    """(input, output) of a finished run of 12 prompts with 2 variants each."""
    folder = tmp_path_factory.mktemp("made")
    colours = ["red", "green", "blue", "white"] * 3
    table = pa.table(
        {
            "prompt": [f"a {colour} circle on a black background" for colour in colours],
            "label": colours,
            "place": list(range(12)),
        }
    )
    pq.write_table(table, folder / "prompts.parquet")
    outcome = make(
        folder / "prompts.parquet", folder / "out", variants=2, input__columns__label="label"
    )
    assert outcome.exit_code == 0
    return folder / "prompts.parquet", folder / "out"


def test_every_planned_sample_is_there_and_verifies(made: tuple[Path, Path]) -> None:
    _, output = made
    table = table_of(output)
    assert table.num_rows == 24
    assert len(set(table.column("seed").to_pylist())) == 24
    findings = verify(ledger(output))
    assert findings.ok, findings.problems
    assert (findings.planned, findings.accepted) == (24, 24)


def test_datasets_loads_images_with_every_column(made: tuple[Path, Path], tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(str(made[1]), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 24
    first = loaded[0]
    assert first["image"].size == (32, 32)
    assert first["label"] == "red" and first["place"] == 0
    assert set(first) >= {"key", "prompt", "seed", "variant", "source_id", "sha256", "model_id"}


def test_markers_show_what_each_stage_holds(made: tuple[Path, Path]) -> None:
    marker = ledger(made[1]).marker(0)
    assert marker is not None
    assert {stage: set(parts) for stage, parts in marker.parameter_counts.items()} == {
        "encoder": {"text_encoder"},
        "denoiser": {"unet"},
        "decoder": {"vae"},
    }
    assert marker.environment["torch"] and marker.attempt == 1


def test_bytes_do_not_depend_on_how_the_job_is_laid_out(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, output = made
    outcome = make(source, tmp_path / "out", variants=2, resources__layout="staged")
    assert outcome.exit_code == 0
    make_here(source, tmp_path / "other", variants=2, output__samples_per_shard=7)
    assert digests_of(tmp_path / "out") == digests_of(output) == digests_of(tmp_path / "other")


def test_a_longer_dataset_leaves_the_bytes_of_its_first_rows(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, output = made
    table = pq.read_table(source).select(["prompt"])
    more = pa.table({"prompt": [f"a yellow star {i}" for i in range(5)]})
    longer = tmp_path / "prompts.parquet"
    pq.write_table(pa.concat_tables([table, more]), longer)
    make_here(longer, tmp_path / "out", variants=3)
    digests, before = digests_of(tmp_path / "out"), digests_of(output)
    assert len(digests) == 51
    assert {key: digests[key] for key in before} == before


def test_keys_of_their_own_free_rows_from_their_place(prompts: Prompts, tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel", "fox"]
    one = prompts(6, "one.parquet", animal=names)
    table = pq.read_table(one)
    pq.write_table(table.take([5, 0, 3, 1, 4, 2]), tmp_path / "two.parquet")
    make_here(one, tmp_path / "a", input__columns__key="animal")
    make_here(tmp_path / "two.parquet", tmp_path / "b", input__columns__key="animal")
    assert digests_of(tmp_path / "a") == digests_of(tmp_path / "b")
    assert set(digests_of(tmp_path / "a")) == {f"{name}-v0" for name in names}


def test_row_settings_give_what_one_setting_each_gives(prompts: Prompts, tmp_path: Path) -> None:
    mixed = prompts(4, "prompts.parquet", steps=[2, 3, 2, 3], guidance=[1.0, 1.0, 4.0, 4.0])
    columns = {
        "input__columns__num_inference_steps": "steps",
        "input__columns__guidance_scale": "guidance",
    }
    make_here(mixed, tmp_path / "mixed", **columns)
    together = digests_of(tmp_path / "mixed")
    for row, steps, guidance in [(1, 3, 1.0), (2, 2, 4.0)]:
        output = tmp_path / f"{row}"
        settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        make_here(mixed, output, **{f"sampling__{name}": one for name, one in settings.items()})
        key = f"prompts-{row:08d}-v0"
        assert digests_of(output)[key] == together[key]


def test_bad_rows_are_rejected_with_reasons_and_the_rest_is_made(
    prompts: Prompts, tmp_path: Path
) -> None:
    source = tmp_path / "bad.parquet"
    texts = ["a red circle", None, "  ", "a blue ring", "word " * 500, "a star"]
    pq.write_table(pa.table({"prompt": texts, "steps": [2, 2, 2, -1, 2, 2]}), source)
    outcome = make(
        source,
        tmp_path / "out",
        input__columns__num_inference_steps="steps",
        policy__rejected_limit=0.5,
    )
    assert (outcome.exit_code, outcome.accepted, outcome.rejected) == (0, 3, 3)
    assert {row["source_id"]: row["reason"] for row in rejects_of(tmp_path / "out")} == {
        "bad.parquet#1": "null-prompt",
        "bad.parquet#2": "empty-prompt",
        "bad.parquet#3": "bad-num_inference_steps",
    }
    table = table_of(tmp_path / "out")
    assert table.column("prompt_truncated").to_pylist() == [False, True, False]
    assert verify(ledger(tmp_path / "out")).ok
    again = make(
        source,
        tmp_path / "out",
        input__columns__num_inference_steps="steps",
        policy__rejected_limit=0.4,
    )
    assert again.exit_code == 2 and "rejected_limit" in again.message


def test_image_to_image_follows_the_source_images(tmp_path: Path) -> None:
    sources = [solid((200, 30, 30)), solid((30, 30, 200)), b"not an image", solid((250, 250, 250))]
    table = pa.table({"picture": sources, "prompt": ["a picture"] * 4})
    pq.write_table(table, tmp_path / "images.parquet")
    make_here(
        tmp_path / "images.parquet",
        tmp_path / "out",
        task="image-to-image",
        variants=2,
        input__columns__image="picture",
        sampling__strength=0.2,
        sampling__num_inference_steps=10,
        sampling__guidance_scale=1.0,
    )
    reasons = [row["reason"] for row in rejects_of(tmp_path / "out")]
    assert reasons == ["undecodable-image"] * 2
    made = table_of(tmp_path / "out").to_pylist()
    assert len(made) == 6 and "picture" not in made[0]
    red, blue = (mean_colour(row["image"]["bytes"]) for row in (made[0], made[2]))
    assert red[0] > red[2] and blue[2] > blue[0]


def solid(colour: tuple[int, int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(sink, "PNG")
    return sink.getvalue()


def mean_colour(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1))


def test_a_second_run_makes_nothing_again(made: tuple[Path, Path]) -> None:
    source, output = made
    before = {path: path.stat().st_mtime_ns for path in (output / "data").iterdir()}
    outcome = make(source, output, variants=2, input__columns__label="label")
    assert (outcome.exit_code, outcome.accepted) == (0, 24)
    assert {path: path.stat().st_mtime_ns for path in (output / "data").iterdir()} == before


def test_resume_makes_only_what_is_missing_in_another_layout_too(
    prompts: Prompts, tmp_path: Path
) -> None:
    source, output = prompts(12), tmp_path / "out"
    make_here(source, output)
    whole = digests_of(output)
    kept = output / "data" / "train-00000-of-00003.parquet"
    stamp = kept.stat().st_mtime_ns
    (output / "_batchgen" / "shards" / "00001.json").unlink()
    (output / "data" / "train-00001-of-00003.parquet").write_bytes(b"half a file")
    (output / "data" / "train-00002-of-00003.parquet").unlink()
    (output / "_batchgen" / "shards" / "00002.json").unlink()
    outcome = make(source, output, resources__layout="staged", policy__shard_retries=0)
    assert outcome.exit_code == 0 and verify(ledger(output)).ok
    assert digests_of(output) == whole
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling__guidance_scale": 9.5}, ("sampling.guidance_scale", "9.5")),
        ({"seed": 99}, ("seed", "99")),
        ({"resources__batch_size": 3}, ("resources.batch_size", "3")),
    ],
)
def test_a_changed_spec_is_refused_with_field_and_values(
    made: tuple[Path, Path], settings: dict[str, Any], words: tuple[str, str]
) -> None:
    source, output = made
    asked = {"variants": 2, "input__columns__label": "label", **settings}
    with pytest.raises(PlanChanged) as refused:
        make(source, output, **asked)
    assert all(word in str(refused.value) for word in words)


def test_a_changed_input_is_refused(prompts: Prompts, tmp_path: Path) -> None:
    spec = spec_for(prompts(4), tmp_path / "out")
    plan = runner.plan_job(spec)
    ledger(tmp_path / "out").freeze(plan, spec)
    ledger(tmp_path / "out").commit(
        Marker(
            shard=0,
            counts=Counts(4, 4, 0, 0),
            files=(),
            spec_fingerprint=plan.fingerprints.spec,
            plan_fingerprint=plan.fingerprint,
        )
    )
    prompts(5)
    with pytest.raises(PlanChanged, match=r"prompts\.parquet"):
        runner.resume(str(tmp_path / "out"), quiet=True)


def test_report_and_card_tell_what_happened(made: tuple[Path, Path]) -> None:
    _, output = made
    page = (output / "_batchgen" / "report.html").read_text()
    assert "Complete." in page and page.count("<figure>") == 24
    card = (output / "README.md").read_text()
    assert "| accepted | 24 |" in card and card.startswith("---\nlicense: unknown")
    with Image.open(output / "_batchgen" / "contact-sheet.png") as sheet:
        assert sheet.width > 1000
    plan = json.loads((output / "_batchgen" / "plan.json").read_text())
    assert plan["samples"] == 24 and plan["shards"] == 6
