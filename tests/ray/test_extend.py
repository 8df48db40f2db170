"""Outputs that are extended, on real Ray with the shipped model, also by processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchgen import runner
from batchgen.errors import PlanChanged
from batchgen.output.extension import Extension, extend, further_parts
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.outputs import digests_of, spec_for

pytestmark = pytest.mark.usefixtures("ray_session")
Prompts = Callable[..., Path]


def added(output: Path, **wanted: Any) -> Ledger:
    """The output with a further part, of which nothing is generated yet."""
    ledger = Ledger(open_store(str(output)))
    extend(ledger, further_parts(ledger, Extension(**wanted), ledger.job()))
    return ledger


def test_an_extended_output_has_the_images_of_one_run(prompts: Prompts, tmp_path: Path) -> None:
    source = prompts(6)
    whole = spec_for(source, tmp_path / "whole", variants=3)
    assert runner.run(whole, quiet=True).exit_code == 0
    first = spec_for(source, tmp_path / "out", variants=2, input__limit=5)
    assert runner.run(first, quiet=True).images_made == 10
    with pytest.raises(PlanChanged, match=r"batchgen extend .*out --variants 1` adds them"):
        runner.run(spec_for(source, tmp_path / "out", variants=3, input__limit=5), quiet=True)
    added(tmp_path / "out", limit=1)
    ledger = added(tmp_path / "out", variants=1)
    last = f"{ledger.parts()[2].numbers.start}:"
    ranged = runner.resume(str(tmp_path / "out"), quiet=True, shards=last)
    assert (ranged.exit_code, ranged.images_made, ranged.shards) == (0, 6, 2)
    outcome = runner.run(first, quiet=True)
    assert (outcome.exit_code, outcome.images_made, outcome.planned) == (0, 2, 18)
    found = verify(ledger)
    assert found.ok, found.problems
    assert digests_of(tmp_path / "out") == digests_of(tmp_path / "whole")
    assert runner.run(first, quiet=True).images_made == 0


def test_an_extension_survives_a_killed_process(prompts: Prompts, tmp_path: Path) -> None:
    source = prompts(4)
    assert runner.run(spec_for(source, tmp_path / "whole", variants=9), quiet=True).exit_code == 0
    assert runner.run(spec_for(source, tmp_path / "out"), quiet=True).exit_code == 0
    command = [sys.executable, "-m", "batchgen", "extend", str(tmp_path / "out"), "--variants", "8"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    markers = tmp_path / "out" / "_batchgen" / "shards"
    until = time.monotonic() + 120
    while len(list(markers.glob("*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ledger = Ledger(open_store(str(tmp_path / "out")))
    assert len(ledger.parts()) == 2
    assert len(ledger.states(ledger.parts()).pending) > 0
    assert runner.resume(str(tmp_path / "out"), quiet=True).exit_code == 0
    assert verify(ledger).ok
    assert digests_of(tmp_path / "out") == digests_of(tmp_path / "whole")
