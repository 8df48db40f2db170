"""Runs the commands of a page of the docs in a folder like a fresh clone, as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import head
from tests.object_store.server import missing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tasks/*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_HERE = {"make test", ". .venv/bin/activate"}  # these tests are part of the first
STARTS_A_JOB = re.compile(
    r"^(batchgen|make) (run|resume|extend|replay|score|submit|demo)\b", re.MULTILINE
)
S3_SERVER = "tests.object_store.server"  # in blocks that need programs beside Python's


def blocks(page: Path) -> list[str]:
    found = []
    for block in BLOCK.findall(page.read_text()):
        lines = [line for line in block.splitlines() if line not in NOT_HERE]
        found.append("\n".join(lines))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a fresh clone, whose set-up is done already by the environment at hand."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "ray-cluster.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("jobs", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").symlink_to(ROOT / "tests")
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "batchgen"):
        command = bin_folder / name
        command.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
        command.chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    yield folder
    if (folder / "out" / "s3" / "pids.json").exists():  # a block failed before it stopped it
        stop = [sys.executable, "-m", S3_SERVER, "--folder", str(folder / "out" / "s3"), "--stop"]
        subprocess.run(stop, cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """With a `ray` that starts and ends a head of its own; short paths, for Ray's sockets.

    Jobs have one replica: the imports of each one are most of what these small jobs cost.
    """
    folder = Path(tempfile.mkdtemp(prefix="bgd"))
    yield {**os.environ, **head.install(folder), "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}
    head.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


def starts_a_job(page: Path) -> bool:
    return any(STARTS_A_JOB.search(block) for block in blocks(page))


def run_page(page: Path, checkout: Path, env: dict[str, str]) -> None:
    """Run every block of the page, in order, on the output of `make demo`."""
    shown = blocks(page)
    if "make demo" not in shown and not (checkout / "out" / "demo").exists():
        subprocess.run(["make", "demo"], cwd=checkout, env=env, check=True, capture_output=True)
    left_out = S3_SERVER if missing() and not os.environ.get("CI") else None
    for block in shown:
        if left_out and left_out in block:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=checkout,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    if left_out and any(left_out in block for block in shown):
        pytest.skip(f"all but what needs an S3 server: install {' '.join(missing())}")
