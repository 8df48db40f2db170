"""`export --sign`: images with a C2PA manifest, which others can read."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchgen.cli import main
from batchgen.errors import InputError, PlanChanged, SpecError
from batchgen.images.files import pixels_in
from batchgen.images.provenance import SOURCE_TYPE
from batchgen.output.export import export
from batchgen.output.find import contents
from batchgen.output.formats import format_of
from batchgen.output.ledger import Ledger
from batchgen.output.sign import UNSIGNED, open_signer
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.certificates import write_chain
from tests.datasets_on_disk import plan_for, write_prompts

c2pa = pytest.importorskip("c2pa")
KINDS = ("png", "jpeg", "webp")


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    folder = tmp_path_factory.mktemp("signing")
    write_prompts(folder / "in.parquet", 5)
    dotted = {"output__image_format": request.param, "output__samples_per_shard": 2}
    plan = plan_for(folder / "in.parquet", folder / "out", **dotted)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    return ledger


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_chain(tmp_path_factory.mktemp("pem"))


def rows_of(ledger: Ledger) -> dict[str, dict[str, Any]]:
    plan = ledger.require_plan()
    form = format_of(plan)
    found = [
        row
        for marker in ledger.markers(ledger.states(plan).committed)
        for row in form.read(dict(contents(ledger, marker))).to_pylist()
    ]
    return {row["key"]: row for row in found}


def kind_of(ledger: Ledger) -> str:
    return ledger.require_plan().spec.output.image_format


@pytest.mark.parametrize("form", ["parquet", "webdataset", "image-folder"])
def test_a_signed_copy_verifies_and_others_read_its_manifests(
    source: Ledger, pem: tuple[str, str], form: str, tmp_path: Path
) -> None:
    kind = kind_of(source)
    copy = Ledger(open_store(str(tmp_path / "copy")))
    signer = open_signer(*pem, kind)  # type: ignore[arg-type]
    assert export(source, copy.store, form, signer=signer) == 3
    assert verify(copy).ok
    before, after = rows_of(source), rows_of(copy)
    assert before.keys() == after.keys() and len(after) == 5
    for key, row in after.items():
        data = row["image"]["bytes"]
        assert row["sha256"] == hashlib.sha256(data).hexdigest() != before[key]["sha256"]
        assert row[UNSIGNED] == before[key]["sha256"]
        assert (pixels_in(data) == pixels_in(before[key]["image"]["bytes"])).all()
        told = json.loads(c2pa.Reader(f"image/{kind}", io.BytesIO(data)).json())
        assert told["validation_state"] == "Valid"
        manifest = told["manifests"][told["active_manifest"]]
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert action["action"] == "c2pa.created"
        assert action["digitalSourceType"] == SOURCE_TYPE
        assert manifest["signature_info"]["common_name"] == "signer"


def test_a_signature_breaks_with_the_image(source: Ledger, pem: tuple[str, str]) -> None:
    kind = kind_of(source)
    image = next(iter(rows_of(source).values()))["image"]["bytes"]
    signed = bytearray(open_signer(*pem, kind)(image))  # type: ignore[arg-type]
    signed[-30] ^= 1  # of the pixels or their checksum
    try:
        told = json.loads(c2pa.Reader(f"image/{kind}", io.BytesIO(bytes(signed))).json())
    except c2pa.C2paError:
        return
    assert told["validation_state"] == "Invalid"


def test_the_key_is_stored_nowhere(source: Ledger, pem: tuple[str, str], tmp_path: Path) -> None:
    """Neither the key nor its path is in a file of the copy, or in what the command prints."""
    target = tmp_path / "copy"
    args = ["export", source.store.url, str(target), "--format", "parquet"]
    done = CliRunner().invoke(main, [*args, "--sign", pem[0], "--key", pem[1]])
    assert done.exit_code == 0, done.output
    secret = Path(pem[1]).read_text().splitlines()[1]
    for path in [one for one in target.rglob("*") if one.is_file()]:
        data = path.read_bytes()
        assert secret.encode() not in data and b"key.pem" not in data
    assert secret not in done.output and "key.pem" not in done.output
    again = CliRunner().invoke(main, [*args, "--sign", pem[0], "--key", pem[1]])
    assert again.exit_code == 0 and again.output.startswith("0 shards written now")


def test_an_interrupted_export_continues_with_the_same_certificate_only(
    source: Ledger, pem: tuple[str, str], tmp_path: Path
) -> None:
    kind = kind_of(source)
    copy = Ledger(open_store(str(tmp_path / "copy")))
    signer = open_signer(*pem, kind)  # type: ignore[arg-type]
    export(source, copy.store, "parquet", signer=signer)
    kept = rows_of(copy)
    copy.withdraw(1)
    other = open_signer(*write_chain(tmp_path / "other"), kind)  # type: ignore[arg-type]
    with pytest.raises(PlanChanged, match="another certificate"):
        export(source, copy.store, "parquet", signer=other)
    assert export(source, copy.store, "parquet", signer=signer) == 1
    assert verify(copy).ok and rows_of(copy).keys() == kept.keys()
    with pytest.raises(InputError, match="already"):
        export(copy, open_store(str(tmp_path / "twice")), "parquet", signer=signer)
    plain = Ledger(open_store(str(tmp_path / "again")))
    assert export(copy, plain.store, "webdataset") == 3
    assert verify(plain).ok


def faulty(folder: Path, what: str) -> tuple[str, str]:
    if what == "expired":
        return write_chain(folder, days=(-30, -1))
    if what == "early":
        return write_chain(folder, days=(2, 30))
    if what == "usage":
        return write_chain(folder, signs=False)
    if what == "password":
        return write_chain(folder, password=b"secret word")
    chain, key = write_chain(folder)
    if what == "other-key":
        return chain, write_chain(folder / "other")[1]
    if what == "swapped":
        return key, chain
    if what == "no-file":
        return chain, str(folder / "nothing.pem")
    Path(key).write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    return chain, key


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("expired", "expired on"),
        ("early", "valid only from"),
        ("usage", "C2PA does not accept this certificate"),
        ("password", "the key has a password"),
        ("other-key", "not the key of the first certificate"),
        ("swapped", "no certificate in the form of PEM"),
        ("no-file", "there is no such file"),
        ("damaged", "no private key"),
    ],
)
def test_faults_are_named_before_work_starts(what: str, said: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.parquet", 2)
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out")
    make_output(plan, Ledger(open_store(plan.spec.output.url)))
    chain, key = faulty(tmp_path / "pem", what)
    args = ["export", str(tmp_path / "out"), str(tmp_path / "copy"), "--format", "parquet"]
    done = CliRunner().invoke(main, [*args, "--sign", chain, "--key", key])
    assert done.exit_code == 1 and said in done.output, done.output
    assert "PRIVATE" not in done.output and "secret word" not in done.output
    assert not (tmp_path / "copy").exists()


def test_other_formats_and_half_of_the_options_are_refused(tmp_path: Path) -> None:
    chain, key = write_chain(tmp_path)
    with pytest.raises(InputError, match="cannot sign image/bmp"):
        open_signer(chain, key, "bmp")  # type: ignore[arg-type]
    args = ["export", str(tmp_path / "out"), str(tmp_path / "copy")]
    for more, said in (
        (["--format", "parquet", "--sign", chain], "need each other"),
        (["--to", "coco", "--sign", chain, "--key", key], "--sign needs --format"),
    ):
        done = CliRunner().invoke(main, [*args, *more])
        assert done.exit_code == 1 and said in done.output


def test_a_run_does_not_sign(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.parquet", 2)
    with pytest.raises(SpecError, match="a run does not sign"):
        plan_for(tmp_path / "in.parquet", tmp_path / "out", output__signed=True)
    shutil.rmtree(tmp_path)
