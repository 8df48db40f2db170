"""A store that is lost during a run; a job with its model, formats and exports in buckets."""

from __future__ import annotations

from pathlib import Path

from batchgen.models.find import SHIPPED
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.object_store.proxy import FaultProxy, Rule
from tests.s3_commands import batchgen, prompts_there, run_words

__all__ = ["prompts_there"]  # a fixture

MODEL = SHIPPED / "digits-shapes"


def test_a_store_that_goes_away_ends_the_job_and_resume_finishes_it(
    prompts_there: str, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    s3_proxy.rules(Rule("error", method="PUT", target="out/data", skip=1))
    done = batchgen(*run_words(prompts_there), *("--set", "storage.patience_s=2"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert f"cannot write {prompts_there}/out/data/train-0000" in done.stderr
    assert f"continue with `batchgen resume {prompts_there}/out`" in done.stderr
    assert "Traceback" not in done.stderr
    ledger = Ledger(open_store(f"{prompts_there}/out"))
    assert len(ledger.states(ledger.require_plan()).committed) == 1
    s3_proxy.rules()
    again = batchgen("resume", f"{prompts_there}/out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert verify(ledger).ok


def test_models_formats_and_exports_in_buckets(prompts_there: str, tmp_path: Path) -> None:
    model = open_store(f"{prompts_there}/model")
    for path in MODEL.rglob("*"):
        if path.is_file():
            model.put(str(path.relative_to(MODEL)), path.read_bytes())
    done = batchgen(
        *run_words(prompts_there),
        *("--model", model.url, "--set", "output.format=webdataset"),
        cwd=tmp_path,
        BATCHGEN_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    target = f"{prompts_there}/exported"
    exported = batchgen("export", f"{prompts_there}/out", target, "--format=parquet", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    for url in (f"{prompts_there}/out", target):
        findings = verify(Ledger(open_store(url)))
        assert findings.ok and findings.accepted == 12, findings.problems
    names = list(open_store(f"{target}/data").list(""))
    assert names and all(name.endswith(".parquet") for name in names)
