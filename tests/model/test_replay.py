"""A sample is generated again from its row: the same bytes, or a reason why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from batchgen.cli import main
from batchgen.curate.replay import replay
from batchgen.errors import InputError, ModelError, SpecError
from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.output.export import export
from batchgen.output.ledger import Ledger
from batchgen.output.sign import open_signer
from batchgen.storage import open_store
from jobs import task_inputs
from tests.certificates import write_chain
from tests.family_specs import family_spec
from tests.in_process import stream
from tests.outputs import digests_of, spec_for, table_of

NAMES = {
    *(("text-to-image", "stable-diffusion"), ("text-to-image", "flux"), ("inpainting", "inpaint")),
    *(("control", "controlnet"), ("class-conditional", "dit"), ("control", "gligen")),
    *(("image-to-image", "stable-diffusion-xl"), ("super-resolution", "upscale")),
}
FEW = [one for one in FAMILIES if (one.task, one.name) in NAMES]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts in two variants, with settings of their own, two samples a micro-batch."""
    folder = tmp_path_factory.mktemp("replay")
    table = pa.table(
        {
            "prompt": [f"a red circle {number}" for number in range(6)],
            "guidance_scale": [1.0, 2.0, None, 4.0, 5.0, 2.0],
            "scheduler": ["DDIMScheduler", None, "EulerDiscreteScheduler", None, None, None],
        }
    )
    pq.write_table(table, folder / "rows.parquet")
    columns = {name: name for name in ("guidance_scale", "scheduler")}
    dotted = {f"input__columns__{name}": name for name in columns}
    stream(spec_for(folder / "rows.parquet", folder / "out", variants=2, **dotted))
    return folder / "out"


def test_every_sample_replays_without_its_input(output: Path, tmp_path: Path) -> None:
    alone = tmp_path / "out"
    shutil.copytree(output, alone)
    source = output.parent / "rows.parquet"
    source.rename(source.with_suffix(".away"))
    try:
        for key, sha256 in digests_of(alone).items():
            made = replay(str(alone), key)
            assert (made.same, made.sha256, made.exit_code) == (True, sha256, 0), key
            assert not made.differences and made.psnr_db == float("inf")
    finally:
        source.with_suffix(".away").rename(source)


def test_a_sample_of_a_signed_copy_replays(output: Path, tmp_path: Path) -> None:
    """Its file is compared with the one before the signature."""
    pytest.importorskip("c2pa")
    signer = open_signer(*write_chain(tmp_path / "pem"), "png")
    copy = open_store(str(tmp_path / "copy"))
    export(Ledger(open_store(str(output))), copy, "parquet", signer=signer)
    row = table_of(tmp_path / "copy").to_pylist()[0]
    made = replay(str(tmp_path / "copy"), row["key"])
    assert made.same and made.sha256 == row["unsigned_sha256"] != row["sha256"]


@pytest.mark.parametrize("family", FEW, ids=lambda one: f"{one.task}-{one.name}")
def test_samples_of_families_replay(family: Family, tmp_path: Path) -> None:
    task_inputs.main(str(tmp_path / "rows.parquet"))
    model = BUILDERS[family.task, family.name](tmp_path / "model")
    stream(family_spec(family, model, tmp_path / "rows.parquet", tmp_path / "out"))
    for key in list(digests_of(tmp_path / "out"))[::2]:
        assert replay(str(tmp_path / "out"), key).same, key


def test_another_setting_gives_another_image_and_says_how_far(output: Path) -> None:
    key = next(iter(digests_of(output)))
    made = replay(str(output), key, {"guidance_scale": 9, "prompt": "a blue star"})
    assert not made.same and made.exit_code == 0
    assert made.psnr_db is not None and 0 < made.psnr_db < 60
    again = replay(str(output), key, {"guidance_scale": 9, "prompt": "a blue star"})
    assert again.image == made.image
    assert replay(str(output), key, {"guidance_scale": 1.0}).same  # as its row has it
    larger = replay(str(output), key, {"width": 64, "height": 64})
    assert larger.psnr_db is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"guidance": 3}, "did you mean 'guidance_scale'"),
        ({"guidance_scale": -1}, "guidance_scale: got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"width": 33}, "width: got 33"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_a_wrong_setting_is_named(output: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        replay(str(output), next(iter(digests_of(output))), changed)


def test_a_key_that_is_not_there_is_named(output: Path) -> None:
    with pytest.raises(InputError, match="has no sample rows-00000099-v0"):
        replay(str(output), "rows-00000099-v0")


def test_a_rejected_sample_says_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["fine", ""]}), tmp_path / "rows.parquet")
    stream(spec_for(tmp_path / "rows.parquet", tmp_path / "out"))
    with pytest.raises(InputError, match="has no image: empty-prompt"):
        replay(str(tmp_path / "out"), "rows-00000001-v0")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model = BUILDERS["text-to-image", "stable-diffusion"](tmp_path / "model")
    pq.write_table(pa.table({"prompt": ["one"]}), tmp_path / "rows.parquet")
    stream(spec_for(tmp_path / "rows.parquet", tmp_path / "out", model__path=str(model)))
    weights = next((model / "unet").glob("*.safetensors"))
    save_file({name: one + 1 for name, one in load_file(weights).items()}, weights)
    with pytest.raises(ModelError, match="has other weights here"):
        replay(str(tmp_path / "out"), "rows-00000000-v0")


def test_keys_of_a_column_are_found_in_every_format(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["one", "two", "three"], "id": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    for form in ("parquet", "webdataset", "image-folder"):
        dotted = {"input__columns__key": "id", "output__format": form}
        stream(spec_for(tmp_path / "rows.parquet", tmp_path / form, **dotted))
        made = replay(str(tmp_path / form), "b-v0")
        assert made.same
    assert made.sha256 in digests_of(tmp_path / "parquet").values()


def test_the_command_tells_and_saves(output: Path, tmp_path: Path) -> None:
    row = table_of(output).to_pylist()[3]
    words = ["replay", str(output), "--key", row["key"]]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0 and f"sha256 {row['sha256'][:12]}" in found.output
    place = tmp_path / "new.png"
    words += ["--set", "guidance_scale=3", "--save", str(place), "--json"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["same"] is False and facts["saved"] == str(place) and facts["psnr_db"] > 0
    assert place.read_bytes().startswith(b"\x89PNG")


def test_a_process_that_computed_before_is_told(output: Path) -> None:
    """MKL may then add in another order: one 8-bit level in a few pixels."""
    key = next(iter(digests_of(output)))
    code = f"""
import os
os.environ.pop("MKL_CBWR", None)
import torch
torch.randn(9, 9) @ torch.randn(9, 9)
from batchgen.curate.replay import replay
print(*replay({str(output)!r}, {key!r}).lines(), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MKL_CBWR was set, is now not set when this process loaded torch" in done.stdout
