"""The report page, the card and the sheet."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchgen import report
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker
from batchgen.progress.display import Tally
from batchgen.report.card import CATEGORIES, SHOWN_LABELS, _labels, card_of, cell
from batchgen.report.digest import Digest
from batchgen.report.finalize import finalize
from batchgen.report.settings import applying, differing, model_name
from batchgen.spec.tasks import TASK_NAMES
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import paper_plan, plan_for

NASTY = "<script>document.title='owned'</script> & \"quotes\""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finalized output with accepted, rejected and failed samples and one failed shard."""
    folder = tmp_path_factory.mktemp("report")
    texts = [NASTY, "flat", "broken", None, "a red circle", "a star", "never", "made"]
    pq.write_table(pa.table({"prompt": texts}), folder / "in.parquet")
    plan = plan_for(folder / "in.parquet", folder / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(str(folder / "out")))
    make_output(plan, ledger)
    (folder / "out" / "_batchgen" / "shards" / "00003.json").unlink()
    ledger.fail(FailedMarker(3, 2, "RuntimeError", "it <b>broke</b>", "trace", 3, "host", 0.0))
    finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return folder / "out"


def test_page_tells_every_outcome(output: Path) -> None:
    page = (output / "_batchgen" / "report.html").read_text()
    assert "Not complete." in page and "it &lt;b&gt;broke&lt;/b&gt;" in page
    for reason in ("flat-image", "non-finite", "null-prompt"):
        assert reason in page
    assert NASTY not in page and html.escape("<script>") in page


def test_card_counts_and_loads(output: Path) -> None:
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert "| accepted | 3 |" in card and "| dropped: flat-image | 1 |" in card
    assert "| failed | 3 |" in card
    assert front["size_categories"] == ["n<1K"]
    assert "](_batchgen/contact-sheet.png)" in card and "| prompt | string |" in card
    assert str(output) not in card


def test_seeds_and_sizes_have_no_separators() -> None:
    plan = paper_plan([[4]], seed=1234567, sampling__width=1024, sampling__height=1024)
    card = card_of(plan, Tally(1, 1234, accepted=1234), Digest(), (), None)
    assert "| run seed | 1234567 |" in card and "| width | 1024 |" in card
    assert "| accepted | 1,234 |" in card and "contact-sheet" not in card


# Of the Hub's list, those about images.
HUB = {
    *("text-to-image", "image-to-image", "unconditional-image-generation", "image-to-text"),
    *("image-classification", "image-segmentation", "zero-shot-image-classification"),
}


def test_every_task_has_categories_that_the_hub_knows() -> None:
    assert set(CATEGORIES) == set(TASK_NAMES)
    assert {one for each in CATEGORIES.values() for one in each} <= HUB


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"),
        ("digits-shapes", "digits-shapes"),
        ("/home/me/secret-project/my-model/", "my-model"),
        ("../models/mine", "mine"),
        ("s3://bucket/models/mine", "s3://bucket/models/mine"),
    ],
)
def test_a_folder_of_this_machine_is_named_by_its_last_part(model_id: str, name: str) -> None:
    assert model_name(model_id) == name


def test_settings_are_those_that_apply(tmp_path: Path) -> None:
    plain = paper_plan([[4]])
    assert set(applying(plain)) <= {"num_inference_steps", "guidance_scale", "width", "height"}
    edit = replace(plain, model=replace(plain.model, settings=("image_guidance_scale", "eta")))
    assert {"image_guidance_scale", "eta"} <= set(applying(edit))
    changed, others = differing(paper_plan([[4]], seed=7).spec)
    assert ("seed", 7) in changed and not {name for name, _ in others} & {"seed"}
    assert "task" in {name for name, _ in others}


def test_labels_are_counted_and_bounded() -> None:
    labels = Counter({f"label|{number}": 2 for number in range(60)})
    _, table = _labels(labels, 130)
    assert table.count("label\\|") == SHOWN_LABELS
    assert "| other or no label | 30 |" in table
    assert _labels(Counter(), 130) == []


@given(st.text(max_size=300))
def test_a_cell_breaks_no_table(text: str) -> None:
    shown = cell(text)
    assert "\n" not in shown and "<" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*\|", shown)


@pytest.mark.parametrize(
    ("tally", "exit_code", "state"),
    [
        (Tally(2, 4, committed=2), 0, "Complete."),
        (Tally(2, 4, committed=2, rejected=3), 2, "Complete, but"),
        (Tally(2, 4, committed=1, failed_shards=1), 2, "Not complete."),
        (Tally(2, 4, committed=1), 3, "Not complete."),
        (Tally(2, 4, committed=1), 2, "Stopped."),
        (Tally(2, 4, committed=2), 4, "Damaged."),
    ],
)
def test_the_page_says_how_it_ended(tally: Tally, exit_code: int, state: str) -> None:
    assert report._state(tally, exit_code) == state


def test_the_pages_colours_can_be_read() -> None:
    """WCAG AA: a contrast of 4.5 to 1 for text, on the white and on the dark background."""
    page = (Path(report.__file__).parents[1] / "templates" / "report.html").read_text()
    found = re.findall(r"--(?:good|bad): (#[0-9a-f]{6})", page)
    assert len(found) == 4
    for colour, ground in zip(found, ["#ffffff"] * 2 + ["#121212"] * 2, strict=True):
        dark, light = sorted([luminance(colour), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (colour, ground)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_sheet_is_a_picture(output: Path) -> None:
    sheet = Image.open(io.BytesIO((output / "_batchgen" / "contact-sheet.png").read_bytes()))
    assert sheet.size[0] > 1000 and len(set(sheet.convert("L").tobytes())) > 100
