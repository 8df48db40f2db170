"""Complete runs on clusters and machines whose GPU torch or Ray cannot use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchgen.output.ledger import Ledger
from batchgen.plan.choices import SLOW_ON_GPU
from batchgen.storage import open_store
from tests.datasets_on_disk import write_prompts
from tests.fake_driver import ANSWERS, fake_smi

pytestmark = pytest.mark.long
RUN = """
import ray, sys
from batchgen import runner
from batchgen.errors import StopJob
from batchgen.spec.build import build
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
try:
    words = dict(zip(("input", "output"), sys.argv[1:]))
    runner.run(build({**words, "model": {"dtype": sys.argv[3]}}))
except StopJob as error:
    print(error.exit_code, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")
@pytest.mark.parametrize(("dtype", "planned"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_run_on_a_gpu_that_torch_cannot_use_ends_at_once(
    tmp_path: Path, dtype: str, planned: str
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(source), str(tmp_path / "out"), dtype],
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout.splitlines()[-1]
    assert said.startswith("1 ") and torch.__version__ in said and "GPU of" in said, done.stderr
    assert "it retries while" not in done.stdout + done.stderr
    assert not list((tmp_path / "out").glob("data/*"))
    assert Ledger(open_store(str(tmp_path / "out"))).require_plan().spec.model.dtype == planned
    assert done.stderr.count(SLOW_ON_GPU) == (dtype == "float32"), done.stderr


JOIN = """
import ray, subprocess, sys
ray.init("local", num_cpus=2, num_gpus=1, resources={"accelerator_type:T4": 1},
         include_dashboard=False, log_to_driver=False)
words = ["--address", ray.get_runtime_context().gcs_address, *sys.argv[1:]]
done = subprocess.run([sys.executable, "-m", "batchgen", "run", *words])
raise SystemExit(done.returncode)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Ray names the GPU")
def test_a_cluster_is_asked_for_its_gpus_before_the_plan(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    words = ["--input", str(source), "--output", str(tmp_path / "out")]

    def joined(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", JOIN, *words, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = joined("--dry-run")
    assert "device   T4, 14 GiB, float16\n" in done.stdout, done.stderr
    done = joined()  # it joins once more for the run, whose replica finds no GPU here
    assert done.returncode == 1 and "GPU of" in done.stderr, done.stderr
    assert Ledger(open_store(str(tmp_path / "out"))).require_plan().spec.model.dtype == "float16"


LOCAL_RUN = """
import sys
from batchgen import runner
from batchgen.errors import UsageError
from batchgen.spec.build import build
try:
    runner.run(build({"input": {"path": sys.argv[1]}, "output": {"url": sys.argv[2]}}), quiet=True)
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Ray finds the GPU")
def test_a_local_run_beside_a_gpu_that_ray_does_not_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    source = write_prompts(tmp_path / "in.parquet", 4)
    words = [sys.executable, "-c", LOCAL_RUN, str(source), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert "a GPU that Ray does not find (NVIDIA L40S; driver 535.54.03" in done.stdout, done.stderr
